"""The CPU's products for few rows: the same numbers whichever way a maker's CPUs take them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lmi_multi.checkpoint.layout import CODES, QuantizeName
from lmi_multi.checkpoint.quantize import quantize
from lmi_multi.models.spec import Learned, ModelSpec
from lmi_multi.models.weights import Linear
from lmi_multi.ops import cpu


@pytest.mark.parametrize("maker", sorted(cpu.TRANSPOSED))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 32, 33])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_that_of_float64(
    monkeypatch: pytest.MonkeyPatch, maker: str, dtype: torch.dtype, rows: int, biased: bool
) -> None:
    monkeypatch.setattr(cpu, "maker", lambda: maker)
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 48).to(dtype), torch.randn(80, 48).to(dtype)
    bias = torch.randn(80).to(dtype) if biased else None
    y = cpu.CpuOps().linear(x, Linear(weight, bias))
    want = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert y.is_contiguous() and y.shape == (rows, 80) and y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (y.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_product_with_a_quantized_weight(
    kind: QuantizeName, dtype: torch.dtype, rows: int
) -> None:
    torch.manual_seed(rows)
    x = torch.randn(rows, 48).to(dtype)
    # Rows of all sizes that trained weights have, and less.
    exact = torch.randn(80, 48) * torch.logspace(-4, 1, 80)[:, None]
    codes, scale = quantize(exact, CODES[kind])
    bias = torch.randn(80).to(dtype)
    y = cpu.CpuOps().linear(x, Linear(codes, bias, scale))
    want = x.double() @ (codes.double() * scale.double()[:, None]).t()
    assert y.dtype == dtype
    error = (y.double() - bias.double() - want).abs().amax(0)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert (error <= tolerance * want.abs().amax(0).clamp_min(1.0)).all()


@pytest.mark.parametrize("kind", CODES)
def test_sums_of_codes_stay_in_the_range_of_fp16(kind: QuantizeName) -> None:
    weight = torch.full((1, 1024), 0.01)
    codes, scale = quantize(weight, CODES[kind])
    x = torch.full((40, 1024), 4.0, dtype=torch.float16)  # in codes: 4 * 1024 * 448
    y = cpu.CpuOps().linear(x, Linear(codes, None, scale))
    assert y.float() == pytest.approx(torch.full((40, 1), 40.96), rel=2e-3)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\n", "AuthenticAMD"),
        ("vendor_id\t: GenuineIntel\nvendor_id\t: GenuineIntel\n", "GenuineIntel"),
        ("vendor_id\t: Unheard\n", "GenuineIntel"),
        ("", "GenuineIntel"),
    ],
)
def test_the_maker_is_read_from_the_kernel(tmp_path: Path, text: str, name: str) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert cpu.maker(file) == name


def test_a_machine_that_does_not_tell_its_maker_is_taken_for_intel(tmp_path: Path) -> None:
    assert cpu.maker(tmp_path / "absent") == "GenuineIntel"


@pytest.mark.parametrize("maker", sorted(cpu.TRANSPOSED))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_of_one_query_is_that_of_float64(
    monkeypatch: pytest.MonkeyPatch, maker: str, dtype: torch.dtype, kv_heads: int
) -> None:
    monkeypatch.setattr(cpu, "maker", lambda: maker)
    spec = ModelSpec(
        family="gpt2", vocab=8, hidden=32, heads=4, ffn=8, position=Learned(), decoder_layers=1,
        kv_heads=kv_heads,
    )  # fmt: skip
    torch.manual_seed(kv_heads)
    q = torch.randn(3, 1, 4, 8).to(dtype)
    k, v = torch.randn(2, 3, 9, kv_heads, 8).to(dtype)
    bias = torch.randn(3, 4, 1, 9).to(dtype)
    out = cpu.CpuHeads(spec, 1).attend(q, k, v, bias, 0.5, causal=False)
    wide = (
        k.double().repeat_interleave(4 // kv_heads, 2),
        v.double().repeat_interleave(4 // kv_heads, 2),
    )
    scores = torch.einsum("rqhd,rkhd->rhqk", q.double(), wide[0]) * 0.5 + bias.double()
    want = torch.einsum("rhqk,rkhd->rqhd", scores.softmax(-1), wide[1]).reshape(3, 32)
    assert out.dtype == dtype and out.shape == (3, 32)
    assert (out.double() - want).abs().max() <= 2e-2
