"""The kernel that makes heads' queries, keys and values and attends with them, against the kernels
that do one after the other, and against float64.

Up to 8 rows the product's sums are those of `lmi_multi::linear` bit for bit, so the cache is the
same afterwards. Tolerances are of the error's norm over the norm: against single kernels one
rounding to the activations' type; against float64 that of queries, keys and values too, which the
softmax's weights depend on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lmi_multi import backends
from lmi_multi.engine.batch import Row
from lmi_multi.models.bias import alibi_slopes
from lmi_multi.models.weights import Layer, Linear
from lmi_multi.ops.heads import Heads
from lmi_multi.ops.paged import PagedAttention, PagedCache
from lmi_multi.ops.reference import Reference
from tests.test_cuda_attention import POSITIONS, make_layer, make_rows, make_spec, widened
from tests.test_cuda_kernels import (
    EPS,
    TOLERANCE,
    error,
    expected_norm,
    make_linear,
    make_norm,
    ops,
    randn,
    wide,
)
from tests.test_cuda_program import TOLERANCE as OF_LOGITS
from tests.test_cuda_program import logits, opened

pytestmark = pytest.mark.cuda

# Features of x, query heads, kv heads, features of a head: clusters of 8, 4 and 2 blocks, tiles
# that they share evenly or not, features that fill units of 64 or not.
SIZES = [
    (768, 12, 12, 64),
    (1024, 16, 16, 64),
    (200, 3, 3, 80),
    (768, 8, 8, 96),
    (256, 2, 2, 256),
    (384, 6, 2, 128),
    (512, 16, 2, 32),
    (264, 20, 20, 32),
    (64, 40, 40, 16),
    (8, 1, 1, 16),
]
# Too many weights for a block; heads that are no whole tiles; more kv heads than make clusters.
NOT_COVERED = [(2048, 16, 16, 128), (64, 3, 3, 40), (64, 70, 70, 16)]
ROWS = (1, 2, 3, 5, 8, 9, 16)
LENGTHS = (1, 2, 17, 64, 127, 128, 129, 255, 256, 257, 600)
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def _available() -> None:
    state = backends.probe("cuda")
    if not state.ok or state.reason != "compiled kernels":
        pytest.skip(f"cuda: {state.reason}")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuda: clusters of blocks are for compute capability 9.0 and later")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """New memory holds NaN, so that what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


class Case(NamedTuple):
    """A layer, rows, and two caches that hold the same."""

    layer: Layer
    cross_q: Linear
    rows: list[Row]
    caches: tuple[PagedCache, PagedCache]


def make_case(
    size: tuple[int, int, int, int],
    dtype: torch.dtype,
    position: str,
    lengths: list[int],
    chance: random.Random,
    bias: bool = False,
    norms: bool = False,
    window: int = 0,
) -> Case:
    inputs, heads, kv, dim = size
    spec = make_spec(POSITIONS[position], heads, kv, dim)
    table = None
    if position == "alibi":
        table = alibi_slopes(heads).cuda()
    if position == "relative":
        table = randn(32, heads, dtype=dtype)
    layer = replace(
        make_layer(table, window, norms, dim),
        qkv=make_linear((heads + 2 * kv) * dim, inputs, dtype, False, bias),
        norm1=make_norm(inputs, dtype, chance.random() < 0.5),
    )
    rows, blocks = make_rows(lengths, block := chance.choice((8, 16)), chance)
    device = torch.device("cuda")
    first, second = (PagedCache(Heads(spec, 1), blocks, block, dtype, device) for _ in range(2))
    for own, other in ((first.k, second.k), (first.v, second.v)):
        own[0].copy_(randn(*own[0].shape, dtype=dtype))
        other[0].copy_(own[0])
    cross_q = make_linear(heads * dim, inputs, dtype, False, bias)
    return Case(layer, cross_q, rows, (first, second))


def attentions(case: Case) -> tuple[Any, Any]:
    """Of the two caches."""
    from lmi_multi.backends.cuda.attention import CudaPagedAttention, DecodeAttention
    from lmi_multi.backends.cuda.ops import Scratch

    device = torch.device("cuda")
    kernels = (DecodeAttention(cache, Scratch(device)) for cache in case.caches)
    found = [CudaPagedAttention(k.cache, case.rows, device, k) for k in kernels]
    return found[0], found[1]


def extended(attention: Any, layer: Layer, x: Tensor) -> Tensor | None:
    from lmi_multi.backends.cuda.attention import Projection

    made = Projection(x, layer.qkv, layer.norm1, EPS)
    out: Tensor | None = attention._kernel.extend(layer, made, attention._where, attention._angles)
    return out


def check(case: Case, x: Tensor, name: str, normalized: bool = True) -> None:
    """Self-attention, what it leaves in the cache, and cross-attention."""
    from lmi_multi.backends.cuda.attention import Projection

    layer, cross_q, rows, caches = case
    dtype, fused = cross_q.weight.dtype, ops()
    ours, theirs = attentions(case)
    exact = PagedCache(caches[0].heads, 1, caches[0].block_size, torch.float32, x.device)
    exact.k, exact.v = [caches[0].k[0].double()], [caches[0].v[0].double()]
    reference = PagedAttention(exact, rows, x.device)
    norm = layer.norm1 if normalized else None
    given = expected_norm(x, layer.norm1) if normalized else x.double()

    def project(linear: Linear) -> Tensor:
        return fused.linear(x, linear) if norm is None else fused.norm_linear(x, norm, EPS, linear)

    made = Projection(x, layer.qkv, norm, EPS)
    found = ours._kernel.extend(layer, made, ours._where, ours._angles)
    assert found is not None, name
    assert found.dtype == dtype
    single = theirs.attend(layer, project(layer.qkv))
    assert error(found, single.double()) < TOLERANCE[dtype], name
    expected = reference.attend(widened(layer), Reference().linear(given, wide(layer.qkv)))
    assert error(found, expected) < 8 * TOLERANCE[dtype], name

    slots = reference._slots
    for own, other in zip((caches[0].k, caches[0].v), (caches[1].k, caches[1].v), strict=True):
        own, other = own[0].flatten(0, 1), other[0].flatten(0, 1)
        if len(x) > 8:  # the sums' order is another one
            assert error(own[slots], other[slots].double()) < TOLERANCE[dtype], name
            other[slots] = own[slots]
        assert torch.equal(own, other), name

    made = Projection(x, cross_q, norm, EPS)
    found = ours._kernel.read(layer, made, ours._cross_where)
    assert found is not None, name
    single = theirs.cross_attend(layer, project(cross_q))
    assert error(found, single.double()) < TOLERANCE[dtype], name
    expected = reference.cross_attend(layer, Reference().linear(given, wide(cross_q)))
    assert error(found, expected) < 8 * TOLERANCE[dtype], name
    assert torch.equal(caches[0].k[0], caches[1].k[0]), name
    assert not ours._kernel._scratch.counters.any(), name


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("position", POSITIONS)
def test_as_single_kernels_do(position: str, dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    chance = random.Random(f"{position} {dtype}")
    for size in SIZES:
        for rows in chance.sample(ROWS, 3):
            lengths = [chance.choice((chance.randint(1, 600), *LENGTHS)) for _ in range(rows)]
            bias, norms, normalized = (chance.random() < 0.4 for _ in range(3))
            window = chance.choice((0, 0, 5, 100))
            case = make_case(size, dtype, position, lengths, chance, bias, norms, window)
            x = randn(rows, size[0], dtype=dtype)
            name = f"{size}, {lengths}, bias {bias}, norms {norms}, window {window}"
            check(case, x, name, not normalized)


@pytest.mark.parametrize("rows", range(1, 17))
def test_every_number_of_rows(rows: int) -> None:
    torch.manual_seed(rows)
    chance = random.Random(rows)
    lengths = [chance.randint(1, 600) for _ in range(rows)]
    case = make_case(SIZES[0], torch.bfloat16, "relative", lengths, chance)
    check(case, randn(rows, 768, dtype=torch.bfloat16), str(lengths))


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_float32_stream_of_fp16(rows: int) -> None:
    """A T5 in fp16: x is float32, and beyond fp16's range."""
    torch.manual_seed(8)
    case = make_case(
        SIZES[0], torch.float16, "relative", [40 + n for n in range(rows)], random.Random(8)
    )
    check(case, randn(rows, 768, std=1e5), str(rows))


def test_what_is_not_covered_is_left_alone() -> None:
    torch.manual_seed(9)
    chance = random.Random(9)
    for size in NOT_COVERED:
        case = make_case(size, torch.bfloat16, "rope", [5, 6], chance)
        before = case.caches[0].k[0].clone()
        assert extended(attentions(case)[0], case.layer, randn(2, size[0]).bfloat16()) is None
        assert torch.equal(case.caches[0].k[0], before)
    many = make_case(SIZES[0], torch.bfloat16, "rope", [5] * 17, chance)
    assert extended(attentions(many)[0], many.layer, randn(17, 768).bfloat16()) is None
    single = make_case(SIZES[0], torch.float32, "rope", [5], chance)
    assert extended(attentions(single)[0], single.layer, randn(1, 768)) is None


@pytest.mark.parametrize("rows", [1, 3, 8, 16])
def test_in_a_graph_replayed_often(rows: int) -> None:
    """Between products, with dependent launches: what differs from one replay to the next is a
    race, or a block that began or ended too early."""
    from lmi_multi.backends.cuda.attention import Projection

    torch.manual_seed(10)
    chance = random.Random(rows)
    lengths = [chance.randint(100, 400) for _ in range(rows)]
    case = make_case(SIZES[0], torch.bfloat16, "relative", lengths, chance)
    fused, attention = ops(), attentions(case)[0]
    kernel, layer = attention._kernel, case.layer
    outs = [make_linear(768, 768, torch.bfloat16, False, False) for _ in range(8)]
    x = randn(rows, 768, dtype=torch.bfloat16)

    def chain(x: Tensor) -> Tensor:
        for n, out in enumerate(outs):
            own = Projection(x, case.cross_q if n % 2 else layer.qkv, layer.norm1, EPS)
            attended = (
                kernel.read(layer, own, attention._cross_where)
                if n % 2
                else kernel.extend(layer, own, attention._where, attention._angles)
            )
            assert attended is not None
            x = fused.linear_residual(attended, out, x)
        return x

    chain(x)
    graph = torch.cuda.CUDAGraph()
    torch.utils.deterministic.fill_uninitialized_memory = False
    with torch.cuda.graph(graph):
        found = chain(x)
    for _ in range(10):
        x.copy_(randn(rows, 768, dtype=torch.bfloat16))
        expected = chain(x)
        assert expected.isfinite().all()
        differ = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(100):
            found.fill_(torch.nan)
            graph.replay()
            differ += (found != expected).sum()
        assert not differ.item()


class Counted:
    """The kernels, and how often `heads` did its work."""

    def __init__(self) -> None:
        self.done: list[bool] = []

    def heads(self, *given: Any) -> bool:
        self.done.append(torch.ops.lmi_multi.heads(*given))
        return self.done[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.lmi_multi, name)


@pytest.mark.parametrize(
    ("shape", "dtype", "covered"),
    [
        *(("flan", "bf16", True), ("flan", "fp16", True), ("gpt2", "bf16", True)),
        *(("bloom", "fp16", True), ("neox", "bf16", True), ("opt-350m", "fp16", True)),
        *(("llama-gqa", "bf16", False), ("gpt2", "fp32", False)),
    ],
)
def test_whole_networks(
    shape: str, dtype: str, covered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits of captured steps are those of steps of single kernels."""
    ours = opened(shape, dtype, None, 0)
    monkeypatch.setenv("LMI_MULTI_CUDA_HEADS", "0")
    theirs = opened(shape, dtype, None, 0)
    counted = Counted()
    ours._fed._kernel = ours._fed._kernel.with_kernels(counted)
    for rows in (2, 3, 8, 9):
        found, expected = logits(ours, rows, 4), logits(theirs, rows, 4)
        for n, (a, b) in enumerate(zip(found, expected, strict=True)):
            differ = ((a - b).norm() / b.norm()).item()
            assert differ < OF_LOGITS[dtype], f"{rows} rows, step {n}: {differ}"
    assert counted.done
    assert set(counted.done) == {covered}
    assert not ours._fed._scratch.counters.any()
