"""What an artifact stores: each tensor's full shape, its split over ranks, and its dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from lmi_multi.models.schema import Split, TensorSchema, schema
from lmi_multi.models.spec import ModelSpec

DtypeName = Literal["fp32", "fp16", "bf16"]
QuantizeName = Literal["int8", "fp8"]
DTYPES: dict[DtypeName, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
CODES: dict[QuantizeName, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Stored:
    """One tensor of an artifact: `shape` is that of the whole, before the split."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    split: Split | None

    def local_shape(self, degree: int) -> tuple[int, ...]:
        """The shape that each of `degree` ranks holds."""
        return TensorSchema(self.shape, self.split).local_shape(degree)

    def nbytes(self, degree: int) -> int:
        """The bytes that each of `degree` ranks holds."""
        return math.prod(self.local_shape(degree)) * self.dtype.itemsize


def stored_tensors(
    spec: ModelSpec, tensors: Iterable[str], dtype: DtypeName, quantize: QuantizeName | None
) -> list[Stored]:
    """The stored form of canonical `tensors` (weights and biases), each scale after its weight.

    Raises KeyError for a name that no schema has.
    """
    result = []
    for name in tensors:
        module, _, part = name.rpartition(".")
        entry = schema(spec, module)
        if part == "bias":
            entry = entry.bias()
        elif part != "weight":
            raise KeyError(name)
        if quantize and entry.quantized:
            scale = entry.bias()
            result.append(Stored(name, entry.shape, CODES[quantize], entry.split))
            result.append(Stored(f"{module}.scale", scale.shape, torch.float32, scale.split))
        else:
            kind = _float_dtype(spec, module, dtype, quantize)
            result.append(Stored(name, entry.shape, kind, entry.split))
    return result


def _float_dtype(
    spec: ModelSpec, module: str, dtype: DtypeName, quantize: QuantizeName | None
) -> torch.dtype:
    """The FFN's last product overflows fp16 in networks with a wide residual: it stays fp32."""
    down = module.endswith(".down")
    if down and spec.wide_residual and dtype == "fp16" and not quantize:
        return torch.float32
    return DTYPES[dtype]


def parameters(spec: ModelSpec, tensors: Iterable[str]) -> int:
    """The network's number of parameters: canonical weights and biases, a tied head once."""
    return sum(math.prod(s.shape) for s in stored_tensors(spec, tensors, "fp32", None))


def file_order(tensors: list[Stored], degree: int) -> list[Stored]:
    """An order in which every tensor of a rank file lies aligned to its element size.

    The order given is kept when it does that by itself, so that files are written front to back.
    """
    offset = 0
    for tensor in tensors:
        if offset % tensor.dtype.itemsize:
            return sorted(tensors, key=lambda t: -t.dtype.itemsize)
        offset += tensor.nbytes(degree)
    return tensors
