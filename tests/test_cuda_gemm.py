"""Products for Hopper's tensor cores against float64."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from lmi_multi.models.spec import Activation
from lmi_multi.ops.reference import Reference
from tests.test_cuda_kernels import (
    TOLERANCE,
    _available,  # noqa: F401
    _poison,  # noqa: F401
    error,
    make_linear,
    ops,
    randn,
    wide,
)

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("codes", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gemm(dtype: torch.dtype, codes: torch.dtype | None) -> None:
    """Products for Hopper's tensor cores: steps and tiles that end within a box, tiles that many
    blocks share, blocks that have many tiles; the same sums, bit by bit, call after call."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("cuda: these kernels are for sm_90a")
    torch.manual_seed(7)
    chance = random.Random(7)
    fused = ops()
    shapes = [(8, 2), (64, 128), (72, 130), (768, 768), (4096, 4096), (10240, 4096), (4096, 40000)]
    for rows, (inputs, outputs) in itertools.product((1, 9, 16, 17, 33, 64), shapes):
        bias, gated, wide_stream = (chance.random() < 0.5 for _ in range(3))
        kind: Activation | None = chance.choice((None, "gelu", "gelu_tanh", "relu", "silu"))
        if gated and kind is None:
            kind = "gelu_tanh"
        case = f"{rows} x {inputs} -> {outputs}, {kind}, gated {gated}, bias {bias}"
        if inputs % 16:
            inputs += 8 * (codes is not None)  # quantized weights are read so many at a time
        linear = make_linear(outputs, inputs, dtype, codes is not None, bias)
        if codes == torch.float8_e4m3fn:  # down to 2^-8, which is subnormal
            weight = (linear.weight.float() / 256).to(codes)
            linear = replace(linear, weight=weight, scale=linear.scale * 256)
        x = randn(rows, inputs, dtype=dtype)
        expected = Reference().linear(x.double(), wide(linear), kind, gated)
        found = [fused._gemm(x, linear, dtype, None, kind, gated) for _ in range(3)]
        assert error(found[0], expected) < TOLERANCE[dtype], case
        assert all(torch.equal(found[0], other) for other in found), case
        residual = randn(rows, outputs, dtype=torch.float32 if wide_stream else dtype)
        expected = residual.double() + Reference().linear(x.double(), wide(linear))
        found[0] = fused._gemm(x, linear, residual.dtype, residual)
        assert error(found[0], expected) < TOLERANCE[dtype], f"residual, {case}"
    assert not fused._scratch.counters.any()
    x, linear = randn(9, 64, dtype=dtype), make_linear(64, 64, dtype, False, False)
    assert fused._gemm(x.float(), linear, dtype) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_rows(dtype: torch.dtype) -> None:
    """Tiles that end within a box or beyond both ends, fewer tiles than blocks and many a block."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("cuda: these kernels are for sm_90a")
    torch.manual_seed(7)
    chance = random.Random(7)
    fused = ops()
    shapes = [(8, 8), (64, 128), (72, 136), (768, 264), (1032, 2056), (4096, 4096), (10240, 1024)]
    for rows, (inputs, outputs) in itertools.product((65, 128, 129, 256, 300, 2050), shapes):
        bias, gated, wide_stream = (chance.random() < 0.5 for _ in range(3))
        kind: Activation | None = chance.choice((None, "gelu", "gelu_tanh", "relu", "silu"))
        if gated and kind is None:
            kind = "silu"
        case = f"{rows} x {inputs} -> {outputs}, {kind}, gated {gated}, bias {bias}"
        linear = make_linear(outputs * (1 + gated), inputs, dtype, False, bias)
        x = randn(rows, inputs, dtype=dtype)
        expected = Reference().linear(x.double(), wide(linear), kind, gated)
        found = [fused._gemm(x, linear, dtype, None, kind, gated) for _ in range(3)]
        assert error(found[0], expected) < TOLERANCE[dtype], case
        assert all(torch.equal(found[0], other) for other in found), case
        linear = make_linear(outputs, inputs, dtype, False, bias)
        residual = randn(rows, outputs, dtype=torch.float32 if wide_stream else dtype)
        expected = residual.double() + Reference().linear(x.double(), wide(linear))
        found[0] = fused._gemm(x, linear, residual.dtype, residual)
        assert error(found[0], expected) < TOLERANCE[dtype], f"residual, {case}"
    assert fused._gemm(x, make_linear(68, inputs, dtype, False, False), dtype) is None
    assert fused._gemm(x, make_linear(64, inputs, dtype, True, False), dtype) is None


def test_which_products_of_many_rows() -> None:
    """Gates and activations of large networks, where cuBLASLt has no epilogue for them."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("cuda: these kernels are for sm_90a")
    if torch.cuda.get_device_properties(0).multi_processor_count < 114:
        pytest.skip("cuda: a part of a GPU, whose rounds of tiles are other ones")
    fused, dtype = ops(), torch.bfloat16
    large = make_linear(20480, 4096, dtype, False, False)
    assert fused._by_large(2048, large, "gelu_tanh", True)
    assert fused._by_large(2048, large, "relu", False)
    for kind in ("relu", "gelu"):  # it would round before the bias
        assert not fused._by_large(2048, make_linear(20480, 4096, dtype, False, True), kind, False)
    assert not fused._by_large(2048, make_linear(20480, 4096, dtype, True, False), "silu", True)
    assert not fused._by_large(2048, large, None, False)
    assert not fused._by_large(512, large, "gelu_tanh", True)
    assert not fused._by_large(2048, make_linear(4096, 768, dtype, False, False), "silu", True)
    assert not fused._by_large(1100, make_linear(6912, 4096, dtype, False, False), "silu", True)
    x = randn(2048, 4096, dtype=dtype)
    expected = Reference().linear(x, large, "gelu_tanh", True).double()
    assert error(fused.linear(x, large, "gelu_tanh", True), expected) < 2 * TOLERANCE[dtype]
