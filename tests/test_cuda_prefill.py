"""The prefill kernels against float64 on random odd shapes; whole models against float32.

Outputs are poisoned beforehand, and so is the cache beyond the rows' tokens. Tolerances are of the
error's norm over the norm: queries, keys, the softmax's weights and results are each rounded once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from lmi_multi.backends.cuda import prefill_inputs
from lmi_multi.backends.cuda.prefill_graphs import size_of
from lmi_multi.backends.cuda.prefill_inputs import LONG, SHORT, PrefillInputs, Tiling
from torch import Tensor

from lmi_multi.backends.base import Limits
from lmi_multi.backends.torch_executor import TorchExecutor
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.convert import convert
from lmi_multi.engine.batch import Batch, Passage, Prompt, Row
from lmi_multi.models.bias import alibi_slopes
from lmi_multi.ops.heads import Heads
from lmi_multi.ops.packed import PackedAttention
from lmi_multi.ops.paged import PagedAttention, PagedCache
from lmi_multi.ops.reference import Reference
from lmi_multi.ops.sampling import SampleRow
from lmi_multi.parallel.collectives import SingleRank
from tests import prefill_kernel, tiny_models
from tests.families import ENCODERS, GENERATORS, VOCAB
from tests.test_cuda_attention import POSITIONS, make_layer, make_spec, widened
from tests.test_cuda_kernels import _available, _poison, error, randn

__all__ = ["_available", "_poison"]

pytestmark = pytest.mark.cuda

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3.2e-2}
DTYPES = list(TOLERANCE)
DIMS = (8, 32, 40, 64, 80, 96, 128, 136, 256)
OTHER_DIMS = [dim for dim in range(16, 256, 8) if dim not in DIMS]
HEADS = ((3, 3), (4, 2), (16, 2))
# Each row's new tokens, and those that the cache has of it.
CASES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((1, 0), (2, 0), (63, 0), (64, 0), (65, 0), (129, 0)),
    ((7, 1), (64, 64), (1, 700), (130, 33), (5, 0), (1, 1)),
    ((700, 0), (3, 4093), (1, 15)),
    ((4096, 0),),
    tuple((1 + 7 * i % 90, 13 * i % 50) for i in range(40)),
)


def make_rows(
    case: Sequence[tuple[int, int]], block: int, chance: random.Random
) -> tuple[list[Row], int]:
    """Rows with scattered blocks for themselves and for a prompt, and how many blocks there are."""
    counts = [-(-(new + past) // block) for new, past in case]
    total = 2 * sum(counts) + 1
    free = iter(chance.sample(range(total), total))
    rows = []
    for (new, past), count in zip(case, counts, strict=True):
        own, cross = ([next(free) for _ in range(count)] for _ in range(2))
        length = chance.randint((count - 1) * block + 1, count * block)
        rows.append(Row([0] * new, past, own, new + past, cross_blocks=cross, cross_length=length))
    return rows, total


def make_caches(
    rows: Sequence[Row], blocks: int, block: int, heads: Heads, dtype: torch.dtype
) -> tuple[PagedCache, PagedCache]:
    """The same random keys and values in `dtype` and float64; in the first, NaN beyond the rows."""
    device = torch.device("cuda")
    cache = PagedCache(heads, blocks, block, dtype, device)
    exact = PagedCache(heads, blocks, block, torch.float32, device)
    seen = torch.zeros(blocks, block, dtype=torch.bool, device=device)
    for row in rows:
        for own, length in ((row.blocks, row.start), (row.cross_blocks, row.cross_length)):
            slots = cache.slots(own, 0, length).to(device)
            seen.view(-1)[slots] = True
    for ours, theirs in ((cache.k, exact.k), (cache.v, exact.v)):
        ours[0].copy_(randn(*ours[0].shape))
        theirs[0] = ours[0].double()
        ours[0][~seen] = torch.nan
    return cache, exact


def make_table(position: str, heads: int, dtype: torch.dtype) -> Tensor | None:
    if position == "alibi":
        return alibi_slopes(heads).cuda()
    return randn(32, heads, dtype=dtype) if position == "relative" else None


def some_dims(chance: random.Random) -> list[int]:
    """Those at which the kernels change, and a few others: over all tests, every one there is."""
    return [*DIMS, *chance.sample(OTHER_DIMS, 4)]


def tiling(many: bool) -> Tiling:
    """Of the kernel for many keys, or of the other."""
    if many:
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("cuda: the kernel for many keys is for Hopper alone")
        return LONG
    return SHORT


@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_laid_out(seed: int) -> None:
    """Rows of one token and of many, also of none any more, tables that are too narrow, and tokens
    of no row."""
    chance, device = random.Random(seed), torch.device("cuda")
    rows, width, block = chance.randint(1, 70), chance.randint(0, 40), chance.choice((8, 16))
    counts = [chance.choice((1, 1, 2, 5, 130, 0)) for _ in range(rows)]
    lengths = [n + chance.randint(0, 300) for n in counts]
    tokens = sum(counts) + chance.choice((1, 300))
    starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    reached = torch.randint(0, 5000, (rows,), dtype=torch.int32)
    table = torch.randint(-1, 900, (rows, width), dtype=torch.int32)
    given = (starts, torch.tensor(lengths, dtype=torch.int32), reached, table)
    expected = [torch.empty(tokens, dtype=torch.int32) for _ in range(3)]
    assert prefill_kernel.lay_out(*given, block, *expected)
    found = [torch.empty(tokens, dtype=torch.int32, device=device) for _ in range(3)]
    assert torch.ops.lmi_multi.lay_out(*(own.to(device) for own in given), block, *found)
    for own, other in zip(found, expected, strict=True):
        assert own.tolist() == other.tolist()


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", POSITIONS)
def test_rows_over_the_cache(position: str, dtype: torch.dtype, case: int, many: bool) -> None:
    """Self-attention with the cache written, and attention over prompts."""
    from lmi_multi.backends.cuda.prefill import PrefillKernel

    torch.manual_seed(case)
    chance = random.Random(f"{position} {dtype} {case}")
    device = torch.device("cuda")
    for dim in some_dims(chance):
        heads, kv = chance.choice(HEADS)
        spec = make_spec(POSITIONS[position], heads, kv, dim)
        split, table = Heads(spec, 1), make_table(position, heads, dtype)
        window = chance.choice((0, 0, 1, 5, 100))
        layer = make_layer(table, window, chance.random() < 0.3, dim)
        rows, blocks = make_rows(CASES[case], block := chance.choice((8, 16, 32, 128)), chance)
        cache, exact = make_caches(rows, blocks, block, split, dtype)
        kernel, tile = PrefillKernel(split, cache), tiling(many)
        inputs = PrefillInputs.of_rows(rows, block, device, tile)
        norms = layer.q_norm is not None
        what = f"{heads}/{kv} heads of {dim}, {tile}, window {window}, norms {norms}"

        theirs = PagedAttention(exact, rows, device)
        qkv = randn(len(inputs.ids), (heads + 2 * kv) * dim, dtype=dtype)
        expected = theirs.attend(widened(layer), qkv.double())
        angles = split.angles(inputs.positions, inputs.reach)
        before = [pool[0].clone() for pool in (cache.k, cache.v)]
        found = kernel.extend(layer, qkv.clone(), inputs, angles)
        assert found is not None, what
        assert error(found, expected) < TOLERANCE[dtype], what
        slots = theirs._slots
        for ours, exactly, old in zip((cache.k, cache.v), (exact.k, exact.v), before, strict=True):
            new = ours[0].flatten(0, 1)
            assert error(new[slots], exactly[0].flatten(0, 1)[slots]) < TOLERANCE[dtype], what
            new[slots] = old.flatten(0, 1)[slots]
            assert torch.equal(ours[0].nan_to_num(), old.nan_to_num()), what  # nothing else changed

        q = qkv[:, : heads * dim].contiguous()
        read = kernel.read(layer, q, inputs)
        assert read is not None, what
        expected = theirs.cross_attend(layer, q.double())
        assert error(read, expected) < TOLERANCE[dtype], what


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", POSITIONS)
def test_packed_rows(position: str, dtype: torch.dtype, causal: bool, many: bool) -> None:
    """Encoders, and texts that are scored: nothing is stored."""
    from lmi_multi.backends.cuda.prefill import PrefillKernel

    torch.manual_seed(causal)
    chance = random.Random(f"{position} {dtype} {causal}")
    device = torch.device("cuda")
    for dim in some_dims(chance):
        heads, kv = chance.choice(HEADS)
        counts = chance.choice(([1, 64, 65, 3, 300], [700], [2, 128, 128], [7] * 50))
        spec = make_spec(POSITIONS[position], heads, kv, dim)
        split, table = Heads(spec, 1), make_table(position, heads, dtype)
        layer = make_layer(table, chance.choice((0, 20)) if causal else 0, False, dim)
        prompts = [Prompt([0] * n) for n in counts]
        tile = tiling(many)
        inputs = PrefillInputs.of_prompts(prompts, 8, device, tile)
        positions = inputs.positions.long()
        qkv = randn(sum(counts), (heads + 2 * kv) * dim, dtype=dtype)
        expected = PackedAttention(split, counts, positions, causal).attend(layer, qkv.double())
        kernel = PrefillKernel(split, PagedCache(split, 1, 8, dtype, device))
        angles = split.angles(inputs.positions, inputs.reach)
        found = kernel.packed(layer, qkv, inputs, angles, causal)
        assert found is not None
        assert error(found, expected) < TOLERANCE[dtype], f"{heads}/{kv} of {dim}, {counts}"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
def test_keys_and_values_are_stored(dtype: torch.dtype) -> None:
    from lmi_multi.backends.cuda.prefill import PrefillKernel

    device = torch.device("cuda")
    for dim, kv, tokens in ((8, 1, 1), (64, 3, 77), (80, 2, 300), (256, 16, 9), (40, 12, 1111)):
        split = Heads(make_spec(POSITIONS["learned"], kv, kv, dim), 1)
        cache = PagedCache(split, 150, 8, dtype, device)
        cache.whole.zero_()
        slots = torch.randperm(1200, device=device)[:tokens].int()
        slots[tokens // 2] = -1
        kv_packed = randn(tokens, 2 * kv * dim, dtype=dtype)
        layer = make_layer(None, 0, False, dim)
        assert PrefillKernel(split, cache).store(layer, kv_packed, slots)
        stored = slots >= 0
        expected = torch.zeros(2, 1200, kv, dim, dtype=dtype, device=device)
        own = kv_packed.view(tokens, 2, kv, dim)[stored].transpose(0, 1)
        expected[:, slots[stored].long()] = own
        assert torch.equal(cache.k[0].flatten(0, 1), expected[0])
        assert torch.equal(cache.v[0].flatten(0, 1), expected[1])


def test_what_is_not_covered_is_left_alone() -> None:
    from lmi_multi.backends.cuda.prefill import PrefillKernel
    from lmi_multi.backends.cuda.prefill_inputs import PrefillInputs

    device = torch.device("cuda")
    for dim, block, dtype, tile in (
        (64, 8, torch.float32, SHORT),
        (12, 8, torch.bfloat16, SHORT),
        (264, 8, torch.bfloat16, SHORT),
        (64, 12, torch.bfloat16, SHORT),
        (64, 4, torch.bfloat16, LONG),
    ):
        split = Heads(make_spec(POSITIONS["rope"], 2, 2, dim), 1)
        cache = PagedCache(split, 2, block, dtype, device)
        cache.whole.zero_()
        inputs = PrefillInputs.of_rows([Row([0] * 3, 0, [1], 3)], block, device, tile)
        qkv = randn(3, 6 * dim, dtype=dtype)
        before = qkv.clone()
        angles = split.angles(inputs.positions, inputs.reach)
        layer = make_layer(None, 0, False, dim)
        assert PrefillKernel(split, cache).extend(layer, qkv, inputs, angles) is None
        assert torch.equal(qkv, before)
        assert not cache.k[0].any()


# Whole models: ours may differ from float32 by no more than plain torch in the same type does, but
# for chance.
LIMITS = Limits(max_batch=8, max_tokens=128, max_step_tokens=1024, blocks=400, block_size=8)
MORE = 1.5


class Models:
    """One network three times: ours, plain torch in the same type, and plain torch in float32."""

    def __init__(self, folder: Path, family: str, dtype: str) -> None:
        from lmi_multi.backends.cuda.executor import CudaExecutor
        from lmi_multi.backends.cuda.ops import Scratch

        artifact = self._artifact(folder, family, dtype)
        self.spec, device = artifact.spec, torch.device("cuda", 0)
        tensors = {name: t.to(device) for name, t in artifact.load_rank(0, 1).items()}
        single = SingleRank()
        self.ours = CudaExecutor(self.spec, dict(tensors), LIMITS, Scratch(device), single)
        self.torch = TorchExecutor(self.spec, dict(tensors), LIMITS, Reference(), single)
        exact = {name: t.float() for name, t in tensors.items()}
        self.exact = TorchExecutor(self.spec, exact, LIMITS, Reference(), single)
        for executor in (self.ours, self.torch, self.exact):
            if executor.clears_blocks:  # and these rows do not say which are new
                executor._cache.whole.zero_()

    @staticmethod
    def _artifact(folder: Path, family: str, dtype: str) -> Artifact:
        source = tiny_models.checkpoint(folder, family)
        return convert(source, folder / f"{family}-{dtype}", dtype=dtype)  # type: ignore[arg-type]

    def check(self, ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
        allowed = MORE * error(torchs.cuda(), exact.cuda().double()) + 1e-3
        assert error(ours.cuda(), exact.cuda().double()) < allowed


def model_rows(
    spec_is_decoder: bool, parts: Sequence[tuple[int, int]], chance: random.Random
) -> tuple[list[Row], list[Prompt]]:
    """Rows of (start, tokens), each with blocks of its own, and prompts for them."""
    rows, prompts = [], []
    for i, (start, count) in enumerate(parts):
        ids = [chance.randrange(3, VOCAB) for _ in range(count)]
        blocks, cross = (
            [j * 16 + i * 32 + k for k in range(16)] for j in range(2)
        )  # fmt: skip
        row = Row(ids, start, blocks, start + count, sample=SampleRow())
        if not spec_is_decoder:
            words = [chance.randrange(3, VOCAB) for _ in range(5 + 17 * i)]
            prompts.append(Prompt(words, cross_blocks=cross))
            row = row._replace(cross_blocks=cross, cross_length=len(words))
        rows.append(row)
    return rows, prompts


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", sorted(GENERATORS))
def test_models(tmp_path: Path, family: str, dtype: str) -> None:
    """Prompts, then continued ones beside single tokens; uncaptured and captured."""
    models, chance = Models(tmp_path, family, dtype), random.Random(family)
    decoder = models.spec.kind == "decoder"
    first = [(0, n) for n in (1, 2, 33, 64, 65, 90)]
    rows, prompts = model_rows(decoder, first, chance)
    batch = Batch(rows, prompts)
    models.check(*(e.logits(batch) for e in (models.ours, models.torch, models.exact)))
    more = [(start + n, m) for (start, n), m in zip(first, (1, 1, 70, 5, 2, 20), strict=True)]
    batch = Batch(model_rows(decoder, more, chance)[0])
    if not decoder:
        batch = Batch([b._replace(cross_blocks=a.cross_blocks, cross_length=a.cross_length)
                       for a, b in zip(rows, batch.rows, strict=True)])  # fmt: skip
    models.check(*(e.logits(batch) for e in (models.ours, models.torch, models.exact)))

    texts = [[chance.randrange(3, VOCAB) for _ in range(n)] for n in (1, 40, 66)]
    known = [Passage(own, None if decoder else texts[0] + own[::-1]) for own in texts]
    models.check(*(e.score(known) for e in (models.ours, models.torch, models.exact)))

    for count in (1, 3, 6):
        rows, prompts = model_rows(decoder, first[-count:], chance)
        batch = Batch(rows, prompts)
        with torch.inference_mode():
            found = []
            for executor in (models.ours, models.torch, models.exact):
                executor._prepare(batch)
                logits = executor._next_logits(batch.rows)
                assert logits is not None
                found.append(logits)
        assert len(found[0]) == count
        models.check(*found)
    if models.ours._prefill.covers():
        graphs = models.ours._prefill_graphs
        assert models.spec.length_dependent or (graphs is not None and graphs._captured)


@pytest.mark.parametrize("family", ["t5", "gptj", "llama-gqa", "bloom"])
@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
def test_graphs_of_many_tokens(
    tmp_path: Path, family: str, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond what large networks have graphs for; with `many`, by the kernel for many keys."""
    if many:
        tiling(many)
        monkeypatch.setattr(prefill_inputs, "MANY_KEYS", 1)
    models, chance = Models(tmp_path, family, "bf16"), random.Random(family)
    graphs = models.ours._prefill_graphs
    assert graphs is not None
    sizes = set()
    for lengths in ([60, 1], [90] * 7, [100] * 8):
        parts = [(0, n) for n in lengths]
        rows, prompts = model_rows(models.spec.kind == "decoder", parts, chance)
        counts = [len(own.token_ids) for own in prompts or rows]
        sizes.add(size_of(counts, graphs.sizes) or 0)
        batch, found = Batch(rows, prompts), []
        with torch.inference_mode():
            for executor in (models.ours, models.torch, models.exact):
                executor._prepare(batch)
                found.append(executor._next_logits(batch.rows))
        models.check(*found)  # type: ignore[arg-type]
    kind, wanted = "prompts" if prompts else "rows", LONG if many else SHORT
    assert max(sizes) > 512
    assert {(kind, size, wanted) for size in sizes} <= set(graphs._captured)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_encoders(tmp_path: Path, family: str, dtype: str) -> None:
    models, chance = Models(tmp_path, family, dtype), random.Random(family)
    prompts = [
        Prompt([chance.randrange(3, VOCAB) for _ in range(n)]) for n in (1, 7, 60, 60, 13, 2)
    ]
    executors = (models.ours, models.torch, models.exact)
    models.check(*(e.encode(prompts)[0] for e in executors))


@pytest.mark.parametrize("family", ["t5", "gptj", "llama-gqa", "bloom"])
def test_nobody_waits_for_the_gpu(tmp_path: Path, family: str) -> None:
    """A prefill is launched whole before any of it need be done."""
    models, chance = Models(tmp_path, family, "bf16"), random.Random(family)
    decoder = models.spec.kind == "decoder"
    rows, prompts = model_rows(decoder, [(0, 30), (0, 90)], chance)
    ours = models.ours
    with torch.inference_mode():
        for mode in ("default", "error"):  # what is made on first use may wait
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                if prompts:
                    ours._encode_to_cache(prompts)
                    ours._prefill.encode_to_cache(prompts)
                ours._prefill_logits(rows)
                ours._prefill.decode(rows)
            finally:
                torch.cuda.set_sync_debug_mode("default")
