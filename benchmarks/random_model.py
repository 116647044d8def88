"""Our executor over random weights of a true size, made where they are used: no files."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.shapes import DTYPES, Shape
from lmi_multi.checkpoint.layout import DtypeName, QuantizeName, stored_tensors
from lmi_multi.models.config import Config
from lmi_multi.models.registry import family_of
from lmi_multi.models.spec import ModelSpec
from lmi_multi.models.weights import LARGEST


def random_model(
    shape: Shape,
    dtype: DtypeName,
    quantize: QuantizeName | None,
    device: torch.device,
    ranks: int = 1,
) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The spec of a shape, and the tensors that an artifact of it would hold for each of `ranks`:
    all have the same ones, as time does not depend on what is in them."""
    model = shape.build(DTYPES["bf16"], "meta")
    fields = model.config.to_dict() | {"architectures": [type(model).__name__]}
    family = family_of(fields["architectures"][0])
    spec = family.spec(Config(fields))
    known = {key.removeprefix(family.base) for key in model.state_dict()}
    names = [
        f"{module}.{part}"
        for module, weight in family.weights(spec).items()
        for part in ("weight", "bias")
        if all(f"{source}.{part}" in known for source in weight.sources)
    ]
    torch.manual_seed(0)
    return spec, {
        stored.name: _random(stored.local_shape(ranks), stored.dtype, device)
        for stored in stored_tensors(spec, names, dtype, quantize)
    }


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As large as trained ones are about: norms near one, products that keep the size of x."""
    if dtype in LARGEST:
        codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        return codes if dtype == torch.int8 else codes.to(torch.bfloat16).to(dtype)
    if len(shape) == 1:
        return torch.rand(shape, dtype=dtype, device=device) / 64
    made = torch.empty(shape, dtype=dtype, device=device)
    return made.normal_(std=1 / math.sqrt(shape[-1]))
