"""What a step's program is made of: for which layers there is one, and where their norms are.

Phases are recorded by stand-ins for the kernels; test_cuda_program.py runs real ones.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lmi_multi.checkpoint.quantize import quantize
from lmi_multi.models.weights import Linear, Norm
from lmi_multi.ops.reference import Reference
from tests.cuda_stand_ins import Programs, recorded_linear, stand_in


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> Programs:
    """The stand-ins of all that needs a GPU."""
    return stand_in(monkeypatch)


def test_programs_are_for_large_products() -> None:
    from lmi_multi.backends.cuda.program import LEAST_PRODUCT, program_rows

    def layer(nbytes: int, dtype: torch.dtype, norm: Norm, scale: Tensor | None = None) -> Any:
        weight = torch.empty(1, nbytes // dtype.itemsize, dtype=dtype, device="meta")
        linear = Linear(weight, scale=scale)
        return SimpleNamespace(qkv=linear, up=linear, norm1=norm, cross_q=None, index=0)

    def norm(features: int, dtype: torch.dtype, centred: bool = False) -> Norm:
        weight = torch.empty(features, dtype=dtype, device="meta")
        return Norm(weight, weight if centred else None)

    bf16, fp16, fp32, codes = torch.bfloat16, torch.float16, torch.float32, torch.int8
    scale, enough = torch.ones(1), LEAST_PRODUCT
    assert program_rows([]) == 0
    for expected, given in (
        (0, layer(enough - 4, bf16, norm(4096, bf16))),
        (16, layer(enough, bf16, norm(4096, bf16))),
        (8, layer(enough, bf16, norm(4104, bf16))),
        (16, layer(enough, bf16, norm(4096, bf16, centred=True))),
        (8, layer(enough, fp16, norm(4096, fp16))),
        (8, layer(enough, fp32, norm(4096, fp32))),
        (16, layer(enough, codes, norm(4104, fp16, centred=True), scale)),
        (8, layer(enough, codes, norm(4096, fp32), scale)),
    ):
        assert program_rows([given] * 2) == expected


@pytest.mark.parametrize("rows", [1, 4, 5, 8, 9, 16])
def test_who_takes_a_norm(rows: int) -> None:
    """A product itself, or a phase of its own in front of it."""
    from lmi_multi.backends.cuda.program import _fuses_norm

    for features, dtype, behind in (
        (4096, torch.bfloat16, True),
        (4104, torch.bfloat16, False),
        (4096, torch.float16, False),
    ):
        x = torch.empty(rows, features, dtype=dtype, device="meta")
        assert _fuses_norm(x) == (rows <= 4 if rows <= 8 else behind)


@pytest.mark.parametrize(
    ("rows", "name", "phases"), [(4, "float16", 1), (8, "bfloat16", 2), (16, "bfloat16", 1)]
)
@pytest.mark.parametrize("centred", [True, False])
def test_a_norm_that_no_product_takes_is_a_phase(
    rows: int, name: str, phases: int, centred: bool
) -> None:
    from lmi_multi.backends.cuda.program import Recorder

    def made(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=getattr(torch, name))

    x, weight, norm = made(rows, 64), made(32, 64), made(64)
    recorder = Recorder([x])
    terms = (None, None, norm, norm if centred else None, 1e-5, None, 0, False, 1)
    assert recorder.linear(x, weight, *terms, made(1), made(1), made(rows, 32))
    assert len(recorder.phases) == phases


def test_a_bias_over_next_to_nothing_is_left_to_other_kernels() -> None:
    from lmi_multi.backends.cuda.program import NotCoveredError, Recorder

    def made(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.bfloat16)

    x, weight, norm = made(16, 64), torch.ones(32, 64, dtype=torch.int8), made(64)
    recorder = Recorder([x])
    for scale, covered in ((1e-30, True), (1e-39, False)):
        terms = (torch.full((32,), scale), made(32), norm, norm, 1e-5, None, 0, False, 1)
        given = (x, weight, *terms, made(1), made(1), made(16, 32))
        with nullcontext() if covered else pytest.raises(NotCoveredError):
            assert recorder.linear(*given)


@pytest.mark.parametrize("codes", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_a_layer_norm_behind_a_product(
    codes: torch.dtype | None, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x - mean need not be known in front of it: see `norm_terms`."""
    from lmi_multi.backends.cuda import program

    monkeypatch.setattr(program, "TERMS_AT_ONCE", 7 * 64)  # the last part is a smaller one
    torch.manual_seed(0)
    weight, scale = torch.randn(40, 64), None
    if codes is not None:
        weight, scale = quantize(weight, codes)
    bias = torch.randn(40) if biased else None
    norm = Norm(torch.rand(64) + 0.5, torch.randn(64))
    assert norm.bias is not None
    x = torch.randn(12, 64) + 3
    terms = program.norm_terms(weight, scale, bias, norm.weight, norm.bias)
    assert terms.dtype == torch.float32
    found = torch.empty(12, 40)
    given = (x, weight, scale, None, norm.weight, None, terms, 1e-5, None, 0, False)
    recorded_linear(*given, torch.empty(0), torch.empty(0), found)
    ops = Reference()
    expected = ops.linear(ops.norm(x, norm, 1e-5), Linear(weight, bias, scale))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
