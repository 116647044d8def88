"""What the host tells the prefill kernel: which block does which queries, and where all lies."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from lmi_multi.backends.cuda import prefill_inputs
from lmi_multi.backends.cuda.prefill import DistanceBiases
from lmi_multi.backends.cuda.prefill_graphs import SIZES, size_of
from lmi_multi.backends.cuda.prefill_inputs import (
    LONG,
    MANY_KEYS,
    SHORT,
    PrefillInputs,
    tiles,
    tiling_of,
)

from lmi_multi.engine.batch import Prompt, Row
from lmi_multi.models.bias import relative_buckets
from lmi_multi.models.spec import RelativeBias
from lmi_multi.ops.sampling import SampleRow
from tests import prefill_kernel

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none without a GPU; nor the kernel that lays out."""
    copy = lambda values, to: to.copy_(torch.from_numpy(values))  # noqa: E731
    monkeypatch.setattr(prefill_inputs, "upload", copy)
    kernels = SimpleNamespace(lay_out=prefill_kernel.lay_out)
    monkeypatch.setattr(torch.ops, "lmi_multi", kernels, raising=False)


def test_tiles_cover_every_query_once() -> None:
    chance = random.Random(0)
    for _ in range(50):
        counts = [chance.randint(1, 300) for _ in range(chance.randint(1, 20))]
        lengths = [n + chance.choice((0, 0, 17, 400)) for n in counts]
        size = chance.choice((64, 128))
        found = tiles(counts, lengths, size)
        assert len(found) <= sum(counts) // size + len(counts)
        queries = sorted(
            (row, first + i) for row, first in found for i in range(min(size, counts[row] - first))
        )
        assert queries == [(row, i) for row, n in enumerate(counts) for i in range(n)]
        reach = [lengths[row] - counts[row] + first for row, first in found]
        assert reach == sorted(reach, reverse=True)


def test_rows() -> None:
    rows = [
        Row([7], 20, [5, 2, 9], 21, sample=SampleRow()),
        Row([4, 3, 2], 6, [1, 8, 3], 40, (4, 6), 11),
        Row(list(range(70)), 0, list(range(20, 30)), 70, sample=SampleRow()),
    ]
    for extra in (0, 6):
        inputs = PrefillInputs(74 + extra, 3 + extra, 9 + extra, 2 + extra, 8, CPU)
        inputs.fill_rows(rows)
        inputs.lay_out()
        assert inputs.ids.tolist() == [7, 4, 3, 2, *range(70), *[0] * extra]
        assert inputs.positions.tolist() == [20, 6, 7, 8, *range(70), *[0] * extra]
        assert inputs.reach.tolist() == [21, 40, 40, 40, *[70] * 70, *[0] * extra]
        assert inputs.slots.tolist() == [
            *(9 * 8 + 4, 1 * 8 + 6, 1 * 8 + 7, 8 * 8),
            *range(160, 230),
            *[-1] * extra,
        ]
        assert inputs.starts.tolist() == [0, 1, 4, 74, *[74] * extra]
        assert inputs.lengths.tolist() == [21, 9, 70, *[0] * extra]
        assert inputs.table[0, :3].tolist() == [5, 2, 9]
        assert inputs.table[1, :3].tolist() == [1, 8, 0]  # the third block is not reached
        assert inputs.table[2, :9].tolist() == list(range(20, 29))
        assert inputs.cross_lengths.tolist() == [0, 11, 0, *[0] * extra]
        assert inputs.cross_table[1, :2].tolist() == [4, 6]
        assert inputs.last[:2].tolist() == [0, 73]
        assert inputs.tiles[:4].tolist() == [[2, 64], [0, 0], [1, 0], [2, 0]]
        assert (inputs.tiles[4:] == -1).all()
    inputs.clear()
    assert (inputs.tiles == -1).all()
    assert (inputs.slots == -1).all()


def test_inputs_of_a_step_are_no_larger_than_it() -> None:
    rows = [Row([7] * 5, 3, [5, 2, 9], 8), Row([7], 0, [1], 1, (3, 4), 9)]
    inputs = PrefillInputs.of_rows(rows, 8, CPU)
    assert inputs.ids.shape == (6,)
    assert inputs.table.tolist() == [[5], [1]]
    assert inputs.cross_table.tolist() == [[0, 0], [3, 4]]


def test_prompts() -> None:
    prompts = [Prompt([5, 6], cross_blocks=[3]), Prompt([7] * 10, cross_blocks=[9, 1]), Prompt([8])]
    inputs = PrefillInputs.of_prompts(prompts, 8, CPU)
    assert inputs.ids.tolist() == [5, 6, *[7] * 10, 8]
    assert inputs.positions.tolist() == [0, 1, *range(10), 0]
    assert inputs.slots.tolist() == [24, 25, *range(72, 80), 8, 9, -1]
    assert inputs.starts.tolist() == [0, 2, 12, 13]
    assert inputs.lengths.tolist() == inputs.reach[[0, 2, 12]].tolist() == [2, 10, 1]


def test_nothing_is_left_of_the_last_step() -> None:
    """But ids, which are computed for nothing."""
    inputs = PrefillInputs(140, 4, 20, 0, 8, CPU)
    inputs.fill_rows([Row([5] * 70, 0, range(9), 70), *[Row([5], 9, [1, 2], 10)] * 3])
    inputs.lay_out()
    inputs.fill_prompts([Prompt([3, 4], cross_blocks=[6])])
    inputs.lay_out()
    assert inputs.ids[:2].tolist() == [3, 4]
    assert inputs.starts.tolist() == [0, 2, 2, 2, 2]
    assert inputs.positions.tolist() == [0, 1] + [0] * 138
    assert inputs.reach.tolist() == [2, 2] + [0] * 138
    assert inputs.slots.tolist() == [48, 49] + [-1] * 138
    assert inputs.tiles.tolist() == [[0, 0]] + [[-1, -1]] * 5


def test_slots_of_rows_and_of_prompts() -> None:
    def row(blocks: list[int], start: int, count: int) -> Row:
        return Row([3] * count, start, blocks, start + count, sample=None)

    made = PrefillInputs.of_rows([row([4, 0, 7], 6, 12), row([9], 0, 2)], 8, CPU)
    assert made.slots.tolist() == [38, 39, *range(8), 56, 57, 72, 73]
    prompts = [Prompt([3] * 10, cross_blocks=[2, 5]), Prompt([3], cross_blocks=[7])]
    made = PrefillInputs.of_prompts(prompts, 8, CPU)
    assert made.slots.tolist() == [*range(16, 24), 40, 41, 56]
    made = PrefillInputs.of_prompts([Prompt([3] * 9), Prompt([3], cross_blocks=[0])], 8, CPU)
    assert made.slots.tolist() == [-1] * 9 + [0]
    assert PrefillInputs.of_prompts([Prompt([3] * 2)], 8, CPU).slots.tolist() == [-1, -1]


@pytest.mark.parametrize("causal", [False, True])
def test_bias_by_distance_is_that_of_the_buckets(causal: bool) -> None:
    position, table = RelativeBias(buckets=32, max_distance=128), torch.randn(32, 3)
    biases = DistanceBiases()
    found = biases.of(table, position, causal)
    assert found is biases.of(table, position, causal)
    center = 0 if causal else 128
    for distance in (*range(-300, 301), 5000):  # how far the query is behind the key
        if causal and distance < 0:
            continue
        bucket = relative_buckets(torch.tensor([-distance]), position, bidirectional=not causal)
        at = min(max(distance + center, 0), found.shape[1] - 1)
        assert torch.equal(found[:, at], table[bucket[0]])


def test_many_keys_are_for_a_kernel_of_their_own() -> None:
    """Of most tokens: a long row that one token is new of leaves the others theirs."""
    few = MANY_KEYS - 1
    assert tiling_of([MANY_KEYS], [MANY_KEYS], 256, True) == LONG
    assert tiling_of([MANY_KEYS], [MANY_KEYS], 256, False) == SHORT
    assert tiling_of([few], [few], 128, True) == SHORT
    assert tiling_of([few], [few], 256, True) == LONG
    assert tiling_of([few, 5], [few, 2 * MANY_KEYS], 64, True) == LONG
    assert tiling_of([128] * 64 + [1], [128] * 64 + [4096], 64, True) == SHORT


def test_sizes_of_graphs() -> None:
    assert size_of([1], SIZES) == SIZES[0]
    assert size_of([100, 28], SIZES) == 128
    assert size_of([100, 29], SIZES) == 160
    assert size_of([SIZES[-1]], SIZES) == SIZES[-1]
    assert size_of([SIZES[-1], 1], SIZES) is None
    assert size_of([1] * 16, SIZES) == 16
    assert size_of([1] * 17, SIZES) is None
    larger = (*SIZES, 1024, 2048, 3072, 4096)
    assert size_of([40] * 64, larger) == 4096  # 3,072 have no room for so many rows
    assert size_of([32] * 64, larger) == 4096
    assert size_of([31] * 64, larger) is None  # it would be half empty
    assert size_of([1] * 17, larger) is None
    assert size_of([], SIZES) is None
