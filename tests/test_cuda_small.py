"""Kernels on a few small shapes, so that a sanitizer, which slows them down a hundred times, gets
through in minutes:

    compute-sanitizer --tool racecheck python -m pytest tests/test_cuda_small.py
    compute-sanitizer --tool memcheck python -m pytest tests/test_cuda_small.py

Not here: sums over peer memory, and steps with such. Of step kernels (`as-one`) racecheck reports
pairs of accesses that have a barrier of the whole block between them, where teams of a block's
warps have barriers of their own. In those of the `wide` shapes a block is one team.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from lmi_multi.backends.cuda.prefill import PrefillKernel
from lmi_multi.backends.cuda.prefill_inputs import PrefillInputs

from lmi_multi.backends.torch_executor import TorchExecutor
from lmi_multi.engine.batch import Prompt, Row
from lmi_multi.engine.engine import Engine
from lmi_multi.ops.heads import Heads
from lmi_multi.ops.paged import PagedAttention
from lmi_multi.ops.reference import Reference
from lmi_multi.timing import time_generation
from tests.test_cuda_attention import POSITIONS, make_layer, make_spec, widened
from tests.test_cuda_beams import Case, logits_of, scratch
from tests.test_cuda_draw import check, some_logits, some_row
from tests.test_cuda_kernels import (
    EPS,
    TOLERANCE,
    _available,  # noqa: F401
    _poison,  # noqa: F401
    error,
    expected_norm,
    make_linear,
    make_norm,
    ops,
    randn,
    wide,
)
from tests.test_cuda_prefill import TOLERANCE as OF_PREFILL
from tests.test_cuda_prefill import make_caches, make_rows, make_table, tiling
from tests.test_cuda_program import TOLERANCE as OF_STEPS
from tests.test_cuda_program import logits, need_programs, opened

pytestmark = pytest.mark.cuda
HALF = torch.bfloat16


@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize("codes", [None, torch.int8, torch.float8_e4m3fn], ids=str)
def test_products(rows: int, codes: torch.dtype | None) -> None:
    """With a norm, a gate, a residual; by features shared among blocks; widened."""
    torch.manual_seed(0)
    fused = ops()
    linear = make_linear(320, 528, HALF, codes is not None, True)
    if codes == torch.float8_e4m3fn:
        linear = replace(linear, weight=(linear.weight.float() / 4).to(codes))
    x, norm = randn(rows, 528, dtype=HALF), make_norm(528, HALF, True)
    residual = randn(rows, 320, dtype=HALF)
    plain = Reference().linear(x.double(), wide(linear))
    split = fused._fused(x, linear, HALF, splits=3)
    tensor_cores = fused._gemm(x, linear, HALF) if fused._hopper else split
    for found, expected in (
        (split, plain),
        (tensor_cores, plain),
        (fused.linear_residual(x, linear, residual), residual.double() + plain),
        (
            fused.norm_linear(x, norm, EPS, linear, "gelu_tanh", True),
            Reference().linear(expected_norm(x, norm), wide(linear), "gelu_tanh", True),
        ),
    ):
        assert found is not None
        assert error(found, expected) < 2 * TOLERANCE[HALF]
    if codes is not None:
        weight, scale = fused._widened(linear.weight, linear.scale, HALF)
        found = weight.double() * scale.double()[:, None]
        assert error(found, wide(linear).weight) < TOLERANCE[HALF]
    y = randn(rows, 640, dtype=HALF)
    expected = Reference().activate(y.double(), "gelu", True)
    assert error(fused.activate(y, "gelu", True), expected) < TOLERANCE[HALF]
    assert not fused._scratch.counters.any()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [65, 300])
def test_products_of_many_rows(rows: int, gated: bool) -> None:
    """The kernel for those, on tiles that end within a box."""
    fused = ops()
    if not fused._hopper:
        pytest.skip("cuda: this kernel is for sm_90a")
    torch.manual_seed(0)
    linear = make_linear(264 * (1 + gated), 200, HALF, False, True)
    x, residual = randn(rows, 200, dtype=HALF), randn(rows, 264, dtype=HALF)
    found = fused._gemm(x, linear, HALF, None, "gelu_tanh", gated)
    assert (
        error(found, Reference().linear(x.double(), wide(linear), "gelu_tanh", gated))
        < (TOLERANCE[HALF])
    )
    if not gated:
        found = fused._gemm(x, linear, HALF, residual)
        expected = residual.double() + Reference().linear(x.double(), wide(linear))
        assert error(found, expected) < TOLERANCE[HALF]
    assert not fused._scratch.counters.any()


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [999, 32128])
def test_searches(dtype: torch.dtype, vocab: int) -> None:
    """How beams go on, twice, and the blocks that they copy."""
    case, made = Case(2, 3, 8, vocab, 4), scratch()
    state = case.state(random.Random(0))
    for skipped in (0, 3):
        given, before = logits_of(case, dtype, skipped), state.scores.clone()
        half = int(state.turns[0])
        case.run(given, state, made)
        records = state.found[half, : case.records].view(case.searches, -1)
        for number, record in enumerate(records):
            rows = slice(number * case.width, (number + 1) * case.width)
            case.check(record, given[rows], before[rows])
        blocks = int(state.own.max()) + 1
        cache = randn(2, 2, blocks, case.block_size, 2, 8, dtype=dtype)
        expected = cache.clone()
        for source, target in state.copies.tolist():
            if source >= 0:
                expected[:, :, target] = cache[:, :, source]
        assert torch.ops.lmi_multi.copy_blocks(cache, state.copies)
        assert torch.equal(cache, expected)
    assert not made.counters.any()


@pytest.mark.parametrize("most", [16, 0], ids=["as-one", "single"])
@pytest.mark.parametrize("rows", [2, 5, 13])
@pytest.mark.parametrize("shape", ["flan", "llama-gqa", "gpt2", "wide-gptj", "wide-flan"])
def test_steps(shape: str, rows: int, most: int) -> None:
    """Layers as one kernel, beside kernel by kernel, as other tests compare with float64."""
    if most:
        need_programs()
    own, plain = (opened(shape, "bf16", None, m) for m in (most, 0))
    found, expected = logits(own, rows, 2), logits(plain, rows, 2)
    programs = own._fed._programs.values()
    assert all(programs) and bool(programs) == bool(most)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.isfinite(ours).all()
        assert error(ours, theirs) < OF_STEPS["bf16"]


@pytest.mark.parametrize("position", ["relative", "alibi", "rope"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_many_keys(dim: int, position: str) -> None:
    """Of whole tiles, which the copy engine fetches, and of a last one that is none."""
    torch.manual_seed(0)
    tile, device = tiling(True), torch.device("cuda")
    split = Heads(make_spec(POSITIONS[position], 2, 1, dim), 1)
    rows, blocks = make_rows(((140, 150), (70, 0)), 16, random.Random(0))
    cache, exact = make_caches(rows, blocks, 16, split, HALF)
    layer = make_layer(make_table(position, 2, HALF), 0, False, dim)
    inputs = PrefillInputs.of_rows(rows, 16, device, tile)
    qkv = randn(210, 4 * dim, dtype=HALF)
    expected = PagedAttention(exact, rows, device).attend(widened(layer), qkv.double())
    angles = split.angles(inputs.positions, inputs.reach)
    found = PrefillKernel(split, cache).extend(layer, qkv, inputs, angles)
    assert found is not None
    assert error(found, expected) < OF_PREFILL[HALF]


@pytest.mark.parametrize("rows", [1, 5])
def test_draws(rows: int) -> None:
    """By all options, by several blocks a row."""
    torch.manual_seed(0)
    chance = random.Random(rows)
    own = [
        some_row(chance, 6000, 40, 9)._replace(temperature=1.0, top_p=0.9, typical_p=0.9)
        for _ in range(rows)
    ]
    check(some_logits(chance, rows, 6000, HALF), own, f"{rows} rows", encoded=True)


@torch.inference_mode()
@pytest.mark.parametrize("shape", ["gptj", "llama-gqa", "flan"])
def test_prompts(shape: str) -> None:
    """Of several lengths in one step, by the kernels and by plain torch; tokens drawn in graphs."""
    executor = opened(shape, "bf16", None, 0)
    ids = [[5, 6, 7], list(range(2, 70)), [9]]
    if shape == "flan":
        prompts = [Prompt(own) for own in ids]
        found = executor._prefill.encode(prompts)
        expected = TorchExecutor._encode(executor, prompts)
    else:
        rows = [Row(own, 0, range(i * 8, i * 8 + 8), len(own)) for i, own in enumerate(ids)]
        found = executor._prefill.decode(rows)[0]
        expected = TorchExecutor._decode_part(executor, rows)
    assert error(found, expected) < OF_STEPS["bf16"]
    engine = Engine(executor)
    time_generation(engine, executor._network.spec, rows=3, prompt=20, tokens=5, rounds=1)
    assert not executor._fed._scratch.counters.any()
    engine.close()
