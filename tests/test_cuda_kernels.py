"""The CUDA kernels against float64 on random odd shapes, with outputs poisoned beforehand.

Tolerances are of the error's norm over the norm. Half types: their results are rounded once, and
normalized inputs before; sums are float32. Float32: sums of some thousand products.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lmi_multi import backends
from lmi_multi.models.spec import Activation
from lmi_multi.models.weights import Linear, Norm
from lmi_multi.ops.reference import Reference
from lmi_multi.ops.sampling import SampleRow, Sampling, sample

pytestmark = pytest.mark.cuda

TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCE)
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 70)
EPS = 1e-5


@pytest.fixture(scope="module", autouse=True)
def _available() -> None:
    state = backends.probe("cuda")
    if not state.ok or state.reason != "compiled kernels":
        pytest.skip(f"cuda: {state.reason}")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """New memory holds NaN, so that what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def ops():  # type: ignore[no-untyped-def]
    from lmi_multi.backends.cuda.ops import CudaOps, Scratch

    types = (*DTYPES, torch.int8, torch.float8_e4m3fn)
    every = dict.fromkeys(types, 64)  # kernels wherever there is one
    return CudaOps(Scratch(torch.device("cuda")), every)


def randn(*shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * std).to(dtype)


def wide(of: Linear | Norm) -> Linear:
    """In float64; quantized weights with their scale taken in."""
    weight, scale = of.weight.double(), getattr(of, "scale", None)
    if scale is not None:
        weight = weight * scale.double()[:, None]
    return Linear(weight, None if of.bias is None else of.bias.double())


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found.double() - expected).norm() / expected.norm()).item()


def make_linear(outputs: int, inputs: int, dtype: torch.dtype, int8: bool, bias: bool) -> Linear:
    offset = randn(outputs, dtype=dtype) if bias else None
    if not int8:
        return Linear(randn(outputs, inputs, dtype=dtype, std=inputs**-0.5), offset)
    weight = torch.randint(-128, 128, (outputs, inputs), device="cuda", dtype=torch.int8)
    scale = (torch.rand(outputs, device="cuda") + 0.5) / 74 * inputs**-0.5
    return Linear(weight, offset, scale)


def make_norm(features: int, dtype: torch.dtype, bias: bool) -> Norm:
    offset = randn(features, dtype=dtype) if bias else None
    return Norm(randn(features, dtype=dtype), offset)


def expected_norm(x: Tensor, norm: Norm) -> Tensor:
    n = wide(norm)
    return Reference().norm(x.double(), Norm(n.weight, n.bias), EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("int8", [False, True])
def test_linear(dtype: torch.dtype, int8: bool) -> None:
    torch.manual_seed(0)
    chance = random.Random(0)
    fused = ops()
    for rows in ROWS:
        for _ in range(4):
            inputs = 16 * chance.choice((1, 3, 7, 48, 65, 129, 256, 640, 1024))
            outputs = chance.choice((2, 8, 30, 66, 768, 1000, 2310))
            bias, gated = chance.random() < 0.5, chance.random() < 0.3
            kind: Activation | None = chance.choice((None, "gelu", "gelu_tanh", "relu", "silu"))
            if gated and kind is None:
                kind = "silu"
            linear = make_linear(outputs, inputs, dtype, int8, bias)
            x = randn(rows, inputs, dtype=dtype)
            case = f"{rows} x {inputs} -> {outputs}, {kind}, gated {gated}, bias {bias}"
            expected = Reference().linear(x.double(), wide(linear), kind, gated)
            assert error(fused.linear(x, linear, kind, gated), expected) < TOLERANCE[dtype], case

            norm = make_norm(inputs, dtype, chance.random() < 0.5)
            expected = Reference().linear(expected_norm(x, norm), wide(linear), kind, gated)
            found = fused.norm_linear(x, norm, EPS, linear, kind, gated)
            # The normalized inputs are rounded too, and gates multiply errors.
            assert error(found, expected) < 2 * TOLERANCE[dtype], f"norm, {case}"

            residual = randn(rows, outputs, dtype=dtype)
            expected = residual.double() + Reference().linear(x.double(), wide(linear))
            found = fused.linear_residual(x, linear, residual)
            assert error(found, expected) < TOLERANCE[dtype], f"residual, {case}"


@pytest.mark.parametrize("splits", [1, 2, 3, 5])
def test_shared_features(splits: int) -> None:
    """Splits give the same sums, call after call: their counters are zero again."""
    torch.manual_seed(splits)
    fused = ops()
    for rows in (1, 6, 13, 30):
        linear = make_linear(210, 2064, torch.bfloat16, False, True)
        norm, x = make_norm(2064, torch.bfloat16, True), randn(rows, 2064, dtype=torch.bfloat16)
        expected = Reference().linear(expected_norm(x, norm), wide(linear))
        for _ in range(3):
            found = fused._fused(x, linear, x.dtype, norm, EPS, splits=splits)
            assert error(found, expected) < 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("int8", [False, True])
def test_float32_residual_of_fp16(int8: bool) -> None:
    """A T5 in fp16: float32 stream, fp16 weights; the FFN's last product in float32."""
    torch.manual_seed(1)
    fused = ops()
    for rows in (1, 4, 11, 40):
        x = randn(rows, 512, std=1e5)
        norm = make_norm(512, torch.float16, False)
        up = make_linear(1024, 512, torch.float16, int8, False)
        h = fused.norm_linear(x, norm, EPS, up, "gelu_tanh", True)
        assert h.dtype == torch.float16
        expected = Reference().linear(expected_norm(x, norm), wide(up), "gelu_tanh", True)
        assert error(h, expected) < 3e-3
        down = make_linear(512, 512, torch.float32, int8, False)
        found = fused.linear_residual(h.float(), down, x.clone())
        assert found.dtype == torch.float32
        assert (
            error(found, x.double() + Reference().linear(h.double(), wide(down)))
            < TOLERANCE[torch.float32]
        )
        out = make_linear(512, 512, torch.float16, int8, False)
        found = fused.linear_residual(h, out, x.clone())
        assert found.dtype == torch.float32
        assert error(found, x.double() + Reference().linear(h.double(), wide(out))) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    fused = ops()
    for features in (8, 40, 768, 4096, 10000):
        for bias in (False, True):
            norm = make_norm(features, dtype, bias)
            # A large mean, and an outlier in the first feature: sums of squares would cancel.
            x = (randn(5, features) + 100).to(dtype)
            x[:, 0] = 3000
            assert error(fused.norm(x, norm, EPS), expected_norm(x, norm)) < 10 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    fused, plain = ops(), Reference()
    kinds: tuple[Activation, ...] = ("gelu", "gelu_tanh", "relu", "silu")
    for rows, features in ((1, 8), (3, 24), (70, 2048), (300, 4104)):
        for gated, kind in itertools.product((False, True), kinds):
            y = 3 * randn(rows, features * (1 + gated), dtype=dtype)
            expected = plain.activate(y.double(), kind, gated)
            assert error(fused.activate(y, kind, gated), expected) < TOLERANCE[dtype], (kind, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_widened_codes_are_exact(kind: torch.dtype, dtype: torch.dtype) -> None:
    """Every code there is, in sizes that fill blocks of the kernel, and not."""
    every = torch.arange(256, device="cuda").to(torch.uint8)
    every = every[every.view(kind).float().isfinite()].repeat(2)[:256]
    fused, plain = ops(), Reference()
    for rows in (1, 5, 16, 1000):
        codes, scale = every.repeat(rows, 1).view(kind), torch.rand(rows, device="cuda")
        found, expected = (each._widened(codes, scale, dtype) for each in (fused, plain))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not fused._kernels.widen(codes[0, :8], 1.0, found[0][0, :8])  # no whole 16 bytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy(dtype: torch.dtype) -> None:
    """As `sample` does in float32: ties go to the lowest id, unusable rows are noticed, others
    unharmed. Rows begin anywhere, and may be further apart than they are long; tokens go to the
    row's half of pinned memory."""
    torch.manual_seed(6)
    scratch = ops()._scratch
    cases = [(1, 1), (3, 5), (3, 17), (2, 4096), (1, 32128), (1, 128256), (70, 32128), (9, 50257)]
    for (rows, vocab), skipped in itertools.product(cases, (0, 3)):
        logits = randn(rows, vocab + 2 * skipped, dtype=dtype)[:, skipped : skipped + vocab]
        logits[0, vocab // 2 :] = logits[0].max()
        if rows > 8:
            for row, value in enumerate((torch.nan, torch.inf, -torch.inf), start=1):
                logits[row, vocab // 3] = value
            logits[4] = -torch.inf
            logits[5, 7] = -torch.nan
        ids, lengths = torch.full((rows,), -5).cuda(), torch.arange(rows, dtype=torch.int32).cuda()
        live = (lengths % 2).int()
        drawn = torch.full((2, rows + 2), -5, pin_memory=True)
        turns = (lengths // 2 % 2).int()
        before, half = lengths.clone(), turns.clone()
        assert torch.ops.lmi_multi.greedy(
            logits, drawn, ids, lengths, live, turns, scratch.work, scratch.counters
        )
        torch.cuda.synchronize()
        want = sample(logits.float().contiguous(), Sampling.of([SampleRow()] * rows, "cuda"))
        expected = torch.full_like(drawn, -5)
        own = torch.where(want.finite, want.tokens, -1).cpu()
        expected[half.long().cpu(), torch.arange(rows)] = own
        assert torch.equal(drawn, expected)
        assert torch.equal(ids, want.tokens)
        assert torch.equal(lengths, before + live)
        assert torch.equal(turns, (half + live) % 2)
        assert not scratch.counters.any()


@pytest.mark.parametrize("rows", [3, 20])
def test_kernels_in_a_graph(rows: int) -> None:
    """Captured and replayed on new inputs, with dependent launches between the kernels."""
    torch.manual_seed(4)
    fused = ops()
    linears = [make_linear(1024, 1024, torch.bfloat16, False, True) for _ in range(6)]
    norm = make_norm(1024, torch.bfloat16, True)
    x = randn(rows, 1024, dtype=torch.bfloat16)

    def chain(x: Tensor) -> Tensor:
        for linear in linears:
            x = fused.linear_residual(fused.norm_linear(x, norm, EPS, linear, "gelu"), linear, x)
        return x

    chain(x)
    graph = torch.cuda.CUDAGraph()
    torch.utils.deterministic.fill_uninitialized_memory = False
    with torch.cuda.graph(graph):
        out = chain(x)
    for _ in range(5):
        x.copy_(randn(rows, 1024, dtype=torch.bfloat16))
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, chain(x))
