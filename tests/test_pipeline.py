"""Pipeline stages, alone and with tensor parallelism: the same answers as one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

import lmi_multi
from lmi_multi.backends import microbatches
from lmi_multi.backends.base import Executor, Limits
from lmi_multi.backends.limits import block_bytes
from lmi_multi.backends.microbatches import micro_batches
from lmi_multi.backends.torch_executor import TorchExecutor
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.convert import convert
from lmi_multi.engine.batch import Row
from lmi_multi.errors import OptionError
from lmi_multi.model import Model
from lmi_multi.models.spec import ModelSpec
from lmi_multi.models.stages import Stage, plan_stages
from lmi_multi.ops.cpu import CpuOps
from lmi_multi.parallel.collectives import SingleRank
from lmi_multi.parallel.grid import Grid, connect
from lmi_multi.parallel.local import LocalRanks
from tests import tiny_models
from tests.families import FAMILIES
from tests.matrix import SharedRanks

LIMITS = Limits(max_batch=4, max_tokens=100, max_step_tokens=48, blocks=96, block_size=8)
GRIDS = [Grid(1, 2), Grid(2, 2)]
PROMPTS = [[5, 6, 7], [8], list(range(9, 60)), [9, 10, 11, 12, 13]]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "seed": 3, "top_p": 0.9, "num_return_sequences": 2},
    {"num_beams": 3, "num_return_sequences": 2},
    {"repetition_penalty": 1.3, "logprobs": 2},
]


class Shelf:
    """Lives in every rank and opens one artifact after another: starting ranks takes seconds."""

    def __init__(self, grid: Grid, rank: int, size: int) -> None:
        self.grid, self.rank = grid, rank
        self.executor: TorchExecutor | None = None
        microbatches.TOKENS = 20  # less than a step's, so that steps are split

    def open(self, folder: Path) -> None:
        artifact = Artifact.open(folder)
        stage = artifact.stages(self.grid.pipeline)[self.grid.stage_of(self.rank)]
        names = stage.tensors(tensor.name for tensor in artifact.stored)
        tensors = artifact.load_rank(self.grid.slice_of(self.rank), self.grid.tensor, names)
        assert set(tensors) == names
        ways = connect(self.grid, self.rank, stage)
        self.executor = TorchExecutor(artifact.spec, tensors, LIMITS, CpuOps(), ways)
        assert len(self.executor._cache.k) == len(stage.decoder)

    def use(self, method: str, *arguments: Any) -> Any:
        return getattr(self.executor, method)(*arguments)


@pytest.fixture(scope="module", params=GRIDS, ids=lambda grid: f"tp{grid.tensor}-pp{grid.pipeline}")
def ranks(request: pytest.FixtureRequest) -> Iterator[tuple[Grid, LocalRanks]]:
    grid: Grid = request.param
    opened = LocalRanks(grid.size, partial(Shelf, grid), answering=grid.answering)
    yield grid, opened
    opened.close()


@cache
def _artifact(folder: Path, family: str, dtype: str = "fp32", quantize: str | None = None) -> Path:
    source = tiny_models.checkpoint(folder, family)
    target = folder / f"{family}-{dtype}-{quantize}-stages"
    return convert(source, target, dtype=dtype, quantize=quantize).folder


def _models(ranks: LocalRanks, folder: Path) -> tuple[Model, Model]:
    """The same model in one process, and over the ranks."""
    artifact = Artifact.open(folder)
    tensors = artifact.load_rank(0, 1)
    one: Executor = TorchExecutor(artifact.spec, tensors, LIMITS, CpuOps(), SingleRank())
    return Model(artifact, "cpu", one), Model(artifact, "cpu", SharedRanks(ranks, folder, LIMITS))


def _answers(model: Model, **options: Any) -> list[Any]:
    found = model.generate(PROMPTS, max_new_tokens=9, **options)
    return [(c.token_ids, c.finish_reason, c.error) for c in found]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bert"])
def test_tokens_are_those_of_one_process(
    ranks: tuple[Grid, LocalRanks], checkpoints: Path, family: str
) -> None:
    """Ragged batches, more prompts than rows, prefill in slices, draws, beams; and twice, so that
    prompts begin in the prefix cache."""
    grid, opened = ranks
    if grid.tensor not in FAMILIES[family].degrees:
        pytest.skip(f"{family} has no degree {grid.tensor}")
    one, staged = _models(opened, _artifact(checkpoints, family))
    for options in OPTIONS:
        expected = _answers(one, **options)
        assert _answers(staged, **options) == expected
        assert _answers(staged, **options) == expected
    scores = [m.score(PROMPTS[:2], [[4, 5, 6], [7, 8]]) for m in (one, staged)]
    hidden = [m.encode(PROMPTS) for m in (one, staged)]
    for a, b in zip(*scores, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-4, atol=1e-4)
    for own, other in zip(*hidden, strict=True):
        torch.testing.assert_close(own.hidden, other.hidden, rtol=1e-4, atol=1e-4)


def test_an_encoder(ranks: tuple[Grid, LocalRanks], checkpoints: Path) -> None:
    _, opened = ranks
    one, staged = _models(opened, _artifact(checkpoints, "bert"))
    segments = [[0] * (len(p) - 1) + [1] for p in PROMPTS]
    for own, other in zip(*(m.encode(PROMPTS, segments) for m in (one, staged)), strict=True):
        torch.testing.assert_close(own.hidden, other.hidden, rtol=1e-4, atol=1e-4)
        assert own.pooled is not None and other.pooled is not None
        torch.testing.assert_close(own.pooled, other.pooled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "quantize"), [("bf16", None), ("fp16", None), ("fp32", "int8"), ("bf16", "int8")]
)
@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_other_types(
    ranks: tuple[Grid, LocalRanks],
    checkpoints: Path,
    family: str,
    dtype: str,
    quantize: str | None,
) -> None:
    """What stages hand over keeps its bits, so that stages alone change nothing; T5's wide residual
    stream in fp16 is another type than its weights."""
    grid, opened = ranks
    one, staged = _models(opened, _artifact(checkpoints, family, dtype, quantize))
    if grid.tensor == 1:
        assert _answers(staged) == _answers(one)
    else:  # sums in another order: the same network, not the same bits
        for a, b in zip(*(m.score([[5]], [[6, 7, 8]]) for m in (one, staged)), strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=0.05, atol=0.2)


# --- how a step is cut


def _row(start: int, tokens: int, *blocks: int) -> Row:
    ids = list(range(start, start + tokens))
    return Row(token_ids=ids, start=start, blocks=blocks, prompt_length=start + tokens)


def test_parts_of_a_step() -> None:
    rows = [_row(5, 1, 0, 1), _row(9, 1, 2, 3, 4), _row(4, 7, 5, 6, 7), _row(0, 3, 8)]
    assert micro_batches(rows, 4, 12) == [rows]
    parts = micro_batches(rows, 4, 5)
    shape = [[(row.blocks[0], row.start, len(row.token_ids)) for row in part] for part in parts]
    assert shape == [[(0, 5, 1), (2, 9, 1), (5, 4, 3)], [(5, 7, 4), (8, 0, 1)], [(8, 1, 2)]]
    ids = [token for part in parts for row in part for token in row.token_ids]
    assert ids == [token for row in rows for token in row.token_ids]


def test_rows_that_read_what_others_write() -> None:
    """A block that an earlier row fills may be read, not one that a later row fills."""
    filling, reading = _row(0, 8, 0, 1), _row(8, 4, 0, 1, 2)
    assert len(micro_batches([filling, reading], 4, 6)) == 2
    assert micro_batches([reading, filling], 4, 6) == [[reading, filling]]


# --- how a network is cut


def _spec(family: str, folder: Path) -> tuple[ModelSpec, dict[str, int]]:
    artifact = Artifact.open(_artifact(folder, family))
    return artifact.spec, {tensor.name: tensor.nbytes(1) for tensor in artifact.stored}


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_hold_every_tensor(checkpoints: Path, family: str) -> None:
    """Each once, but for tied embeddings and shared bias tables."""
    spec, sizes = _spec(family, checkpoints)
    first, last = plan_stages(spec, sizes, 2)
    assert first.tensors(sizes) | last.tensors(sizes) == set(sizes)
    twice = first.tensors(sizes) & last.tensors(sizes)
    tied = {"embed.weight"} if "head.weight" not in sizes and spec.decoder_layers else set()
    shared = {n for n in sizes if n.endswith(".0.relative.weight")}
    shared = {n for n in shared if n.replace(".0.", ".1.") not in sizes}
    assert twice - {"embed.weight"} == shared
    assert tied <= twice
    for stack in ("encoder", "decoder"):
        layers = [*getattr(first, stack), *getattr(last, stack)]
        assert layers == list(range(getattr(spec, f"{stack}_layers")))


def _cut(spec: ModelSpec, layers: Sequence[int], embed: int, head: int, count: int) -> list[Stage]:
    """Stages of a decoder whose layers have these bytes."""
    spec = replace(spec, decoder_layers=len(layers))
    sizes = {f"decoder.{i}.qkv.weight": size for i, size in enumerate(layers)}
    return plan_stages(spec, sizes | {"embed.weight": embed, "head.weight": head}, count)


@pytest.mark.parametrize(
    ("layers", "embed", "head", "count", "expected"),
    [
        ([1] * 8, 0, 0, 4, [2, 2, 2, 2]),
        ([1] * 8, 2, 0, 2, [3, 5]),
        ([1] * 8, 0, 4, 2, [6, 2]),
        ([1] * 9, 2, 2, 3, [3, 3, 3]),  # 5, 3, 5: and no other cut has less than 5
        ([5, 1, 1, 1], 0, 0, 2, [1, 3]),
        ([1, 1, 1], 100, 100, 3, [1, 1, 1]),
    ],
)
def test_stages_are_even(
    checkpoints: Path,
    layers: list[int],
    embed: int,
    head: int,
    count: int,
    expected: list[int],
) -> None:
    stages = _cut(_spec("gpt2", checkpoints)[0], layers, embed, head, count)
    sizes = [sum(layers[i] for i in stage.decoder) for stage in stages]
    sizes[0] += embed
    sizes[-1] += head
    wanted, at = [], 0
    for number in expected:
        wanted.append(sum(layers[at : at + number]))
        at += number
    wanted[0] += embed
    wanted[-1] += head
    assert max(sizes) == max(wanted)
    assert [i for stage in stages for i in stage.decoder] == list(range(len(layers)))
    assert all(len(stage.decoder) for stage in stages)


@pytest.mark.parametrize("count", [0, -1, True, 3, "2", 2.0])
def test_invalid_numbers_of_stages(checkpoints: Path, count: Any) -> None:
    # What no model has is refused before one is read; of this one, its layers are named.
    wrong = "but the decoder has 2 layers" if count == 3 else "must be an integer above 0"
    with pytest.raises(OptionError, match=f"pipeline_parallel is {count!r}, {wrong}"):
        lmi_multi.load(
            tiny_models.checkpoint(checkpoints, "gpt2"), backend="cpu", pipeline_parallel=count
        )
    with pytest.raises(OptionError, match=r"the encoder has 2 layers; allowed: .* from 1 to 2"):
        lmi_multi.load(
            tiny_models.checkpoint(checkpoints, "t5"), backend="cpu", pipeline_parallel=3
        )


def test_a_whole_model_over_stages(checkpoints: Path) -> None:
    """By `load`: the cache has the blocks that a stage's own layers leave room for."""
    folder = tiny_models.checkpoint(checkpoints, "t5")
    keywords: dict[str, Any] = {"backend": "cpu", "dtype": "fp32", "max_tokens": 60}
    with lmi_multi.load(folder, **keywords) as one:
        expected = _answers(one)
        spec = one.artifact.spec
    with lmi_multi.load(folder, **keywords, pipeline_parallel=2) as two:
        assert _answers(two) == expected
        assert two.device == "2 processes"
    assert block_bytes(spec, 4, 1, 16, 2) * 3 == block_bytes(spec, 4, 1, 16) * 2
