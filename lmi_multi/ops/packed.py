"""Reference attention of packed sequences over themselves, without a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from lmi_multi.models.weights import Layer
from lmi_multi.ops import Attention
from lmi_multi.ops.heads import Heads


class PackedAttention(Attention):
    """Every packed sequence attends to itself: an encoder's prompts, or, with `causal`, a
    decoder's tokens that are all known (scoring, embeddings). Neighbours of one length are
    attended together.

    `counts` are the sequences' tokens. A decoder with cross-attention needs `cross_kv`, which
    gives a layer's packed keys and values [tokens, 2 * kv_heads * head_dim] of the encoded
    prompts, and their `cross_counts`.
    """

    def __init__(
        self,
        heads: Heads,
        counts: Sequence[int],
        positions: Tensor,
        causal: bool = False,
        cross_kv: Callable[[Layer], Tensor] | None = None,
        cross_counts: Sequence[int] = (),
    ) -> None:
        self.heads, self.counts, self.causal = heads, list(counts), causal
        self._cross_kv, self._cross_counts = cross_kv, list(cross_counts)
        lengths = torch.tensor(self.counts, device=positions.device)
        self._angles = heads.angles(positions, lengths.repeat_interleave(lengths))
        self._device = positions.device
        self._biases: dict[tuple[int, int, int], Tensor | None] = {}

    def attend(self, layer: Layer, qkv: Tensor) -> Tensor:
        """See `Attention.attend`; nothing is stored."""
        heads = self.heads.split(layer, qkv, self._angles)
        plain = layer.position_bias is None and not layer.window
        parts, first = [], 0
        for count, run in groupby(self.counts):
            rows = len(list(run))
            last = first + rows * count
            q, k, v = (x[first:last].view(rows, count, *x.shape[1:]) for x in heads)
            bias = None if plain else self._bias(layer, count, q.dtype)
            parts.append(self.heads.attend(q, k, v, bias, layer.scale, self.causal and plain))
            first = last
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def cross_attend(self, layer: Layer, q: Tensor) -> Tensor:
        """See `Attention.cross_attend`. Raises TypeError in an encoder, which has none."""
        if self._cross_kv is None:
            raise TypeError("an encoder has no cross-attention")
        kv = self._cross_kv(layer).view(-1, 2, self.heads.kv, self.heads.dim)
        memory = kv.split_with_sizes(self._cross_counts)
        queries = q.view(-1, self.heads.q, self.heads.dim).split_with_sizes(self.counts)
        return torch.cat(
            [
                self.heads.attend(
                    own[None], read[None, :, 0], read[None, :, 1], None, layer.scale, False
                )
                for own, read in zip(queries, memory, strict=True)
            ]
        )

    def _bias(self, layer: Layer, count: int, dtype: torch.dtype) -> Tensor | None:
        """One bias a length, shared by the layers that share table and window."""
        table = (id(layer.position_bias), layer.window)
        key = (count, *table)
        if key not in self._biases:
            if any(other[1:] != table for other in self._biases):
                self._biases.clear()  # the previous layer's own
            at = torch.arange(count, device=self._device)
            distance = (at[None] - at[:, None])[None]
            self._biases[key] = self.heads.bias(layer, distance, dtype, causal=self.causal)
        return self._biases[key]
