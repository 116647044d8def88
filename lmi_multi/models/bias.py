"""What positions add to attention scores: T5's bucketed bias and ALiBi's slopes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmi_multi.models.spec import RelativeBias


def relative_buckets(distance: Tensor, bias: RelativeBias, bidirectional: bool) -> Tensor:
    """The bucket of each `key - query` distance (int64, any shape), as T5 defines it.

    Half of the buckets are exact distances, the others grow logarithmically up to
    `max_distance`, computed in float32 (Raffel et al., 2019, section 2.1).
    """
    buckets, offset = bias.buckets, torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = (distance > 0) * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    scale = (buckets - exact) / math.log(bias.max_distance / exact)
    far = exact + (torch.log(distance.clamp(min=1).float() / exact) * scale).long()
    # Clamped last: a compiler of graphs can then see that no index leaves the table.
    return offset + torch.where(distance < exact, distance, far).clamp(0, buckets - 1)


def alibi_slopes(heads: int) -> Tensor:
    """Float32 [heads]: the penalty per token of distance of each head (Press et al., 2021).

    For head counts that are no power of two, the odd slopes of the next power fill the rest.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)
