"""Weight-only int8: per output channel, symmetric."""

from __future__ import annotations

import torch
from torch import Tensor

_ROW_BYTES = 8 * 2**20


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` [out, in] of any floating dtype -> int8 [out, in] in -127..127, float32 scale [out].

    `weight[o, i]` is close to `int8[o, i] * scale[o]`; a row of zeros has scale 1.
    """
    rows, columns = weight.shape
    codes = torch.empty((rows, columns), dtype=torch.int8)
    scales = torch.empty(rows, dtype=torch.float32)
    step = max(1, _ROW_BYTES // (4 * max(columns, 1)))
    for start in range(0, rows, step):
        chunk = weight[start : start + step].float()
        scale = chunk.abs().amax(dim=1) / 127
        scale[scale == 0] = 1.0  # also where the division underflows
        scales[start : start + step] = scale
        codes[start : start + step] = (chunk / scale[:, None]).round_().clamp_(-127, 127)
    return codes, scales
