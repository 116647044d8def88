"""Weight-only quantization: codes of one byte and a scale per output channel, symmetric."""

from __future__ import annotations

import torch
from torch import Tensor

from lmi_multi.models.weights import LARGEST

_ROW_BYTES = 8 * 2**20


def quantize(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`weight` [out, in] of any floating dtype -> codes [out, in] of `dtype`, float32 scale [out].

    `dtype` is int8 or float8_e4m3fn. `weight[o, i]` is close to `codes[o, i] * scale[o]`, and the
    largest of a row is the largest code; a row of zeros has scale 1. Codes are rounded to the
    nearest, to even ones between two, and saturate.
    """
    rows, columns = weight.shape
    largest = LARGEST[dtype]
    codes = torch.empty((rows, columns), dtype=dtype)
    scales = torch.empty(rows, dtype=torch.float32)
    step = max(1, _ROW_BYTES // (4 * max(columns, 1)))
    for start in range(0, rows, step):
        chunk = weight[start : start + step].float()
        scale = chunk.abs().amax(dim=1) / largest
        scale[scale == 0] = 1.0  # also where the division underflows
        scales[start : start + step] = scale
        # Not every release of torch saturates when it casts to e4m3.
        exact = (chunk / scale[:, None]).clamp_(-largest, largest)
        codes[start : start + step] = exact if dtype.is_floating_point else exact.round_()
    return codes, scales
