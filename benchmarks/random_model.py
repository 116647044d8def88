"""Our models over random weights of a true size, made where they are used: no files of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from benchmarks.hollow import hollow_artifact, outline
from benchmarks.shapes import SHAPES, Shape
from lmi_multi import backends
from lmi_multi.backends.base import Executor, Limits
from lmi_multi.backends.limits import row_blocks
from lmi_multi.backends.torch_executor import TorchExecutor
from lmi_multi.checkpoint.layout import CODES, DTYPES, DtypeName, QuantizeName, stored_tensors
from lmi_multi.model import Model
from lmi_multi.models.spec import ModelSpec
from lmi_multi.models.weights import LARGEST
from lmi_multi.ops.cpu import CpuOps
from lmi_multi.parallel.collectives import SingleRank


def random_model(
    shape: Shape,
    dtype: DtypeName,
    quantize: QuantizeName | None,
    device: torch.device,
    ranks: int = 1,
) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The spec of a shape, and the tensors that an artifact of it would hold for each of `ranks`:
    all have the same ones, as time does not depend on what is in them."""
    spec, names = outline(shape)
    torch.manual_seed(0)
    return spec, {
        stored.name: _random(stored.local_shape(ranks), stored.dtype, device)
        for stored in stored_tensors(spec, names, dtype, quantize)
    }


def check(
    device: str, shapes: Sequence[str], dtype: str, quantize: str, results: Path, longest: int = 0
) -> tuple[DtypeName, QuantizeName | None]:
    """The dtype and quantization asked for. Exit with what is wrong with them or the others, if
    anything is; `longest`: tokens that a row will have, 0 if that is no question."""
    for name in shapes:
        allow("--shape", name, SHAPES)
    allow("--dtype", dtype, DTYPES)
    if quantize:
        allow("--quantize", quantize, CODES)
    allow("--device", device, ("cpu", "cuda"))
    if not results.is_dir():
        raise SystemExit(f"--results is {str(results)!r}; no such folder")
    for name in shapes:
        end = outline(SHAPES[name])[0].max_positions
        if end and longest > end:
            raise SystemExit(f"{name}: {longest} tokens wanted, its positions end at {end}")
    state = backends.probe(device)
    if not state.ok or (device == "cuda" and state.reason != "compiled kernels"):
        raise SystemExit(f"{device}: {state.reason}")
    return cast(DtypeName, dtype), cast("QuantizeName | None", quantize or None)


def allow(option: str, given: str, allowed: Iterable[str]) -> None:
    """Exit with the values that an option may have if the given one is none of them."""
    if given not in allowed:
        raise SystemExit(f"{option} is {given!r}; allowed: {', '.join(allowed)}")


def limits_for(
    spec: ModelSpec, rows: int, longest: int, step_tokens: int, idle_tokens: int = 0
) -> Limits:
    """Limits whose cache has room for `rows` rows of `longest` tokens."""
    return Limits(
        max_batch=rows,
        max_tokens=longest,
        max_step_tokens=step_tokens,
        blocks=rows * row_blocks(spec, longest, longest, 16),
        block_size=16,
        max_idle_tokens=idle_tokens,
    )


def open_model(
    name: str,
    dtype: DtypeName,
    quantize: QuantizeName | None,
    device: torch.device,
    folder: Path,
    rows: int,
    longest: int,
    step_tokens: int,
    idle_tokens: int = 0,
) -> Model:
    """A `Model` as `load` gives one, but for its weights and its limits: those of `limits_for`. It
    has no tokenizer, and no end token. `folder` keeps its manifest."""
    spec, tensors = random_model(SHAPES[name], dtype, quantize, device)
    limits = limits_for(spec, rows, longest, step_tokens, idle_tokens)
    artifact = hollow_artifact(name, dtype, quantize, folder)
    return Model(artifact, device.type, _executor(spec, tensors, limits, device), False)


def _executor(
    spec: ModelSpec, tensors: dict[str, Tensor], limits: Limits, device: torch.device
) -> Executor:
    if device.type == "cpu":
        return TorchExecutor(spec, tensors, limits, CpuOps(), SingleRank())
    from lmi_multi.backends.cuda.executor import CudaExecutor
    from lmi_multi.backends.cuda.ops import Scratch

    scratch = Scratch(device, limits.max_batch * spec.heads)
    made: Executor = CudaExecutor(spec, tensors, limits, scratch, SingleRank())
    return made


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Products keep the size of x; norms, biases and scales are below 1/64."""
    if dtype in LARGEST:
        codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
        return codes if dtype == torch.int8 else codes.to(torch.bfloat16).to(dtype)
    if len(shape) == 1:
        return torch.rand(shape, dtype=dtype, device=device) / 64
    made = torch.empty(shape, dtype=dtype, device=device)
    return made.normal_(std=1 / math.sqrt(shape[-1]))
