"""The kernels of beam search: their continuations beside the reference's, and what they leave for
the next step beside a stand-in's in plain torch.

Tolerance: 1e-5 a score, whose sums are float32's like the reference's, in another order. Where two
scores are as near as that, either may come first.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from lmi_multi.backends.cuda.ops import Scratch
from torch import Tensor

from lmi_multi import backends
from lmi_multi.ops.beams import Beams, best_continuations
from tests import beams_kernel

pytestmark = pytest.mark.cuda
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = 1e-5
POISON = -77
# Searches, beams of each, continuations, vocabulary.
SHAPES = [
    (1, 4, 8, 32128), (8, 4, 8, 32128), (3, 4, 9, 999), (5, 8, 16, 5003), (1, 2, 4, 50257),
    (1, 8, 32, 128256), (2, 1, 2, 7), (4, 3, 6, 64), (1, 5, 32, 17), (1, 32, 32, 501),
    (2, 2, 16, 4), (3, 6, 12, 50265), (2, 7, 1, 40000),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _available() -> None:
    state = backends.probe("cuda")
    if not state.ok or state.reason != "compiled kernels":
        pytest.skip(f"cuda: {state.reason}")


class State(NamedTuple):
    """What a step of searches changes, and, in front, what it only reads."""

    own: Tensor
    stops: Tensor
    live: Tensor
    found: Tensor
    scores: Tensor
    ids: Tensor
    lengths: Tensor
    turns: Tensor
    table: Tensor
    copies: Tensor

    def copy(self) -> State:
        return State(*(part.cpu().clone() for part in self))


class Case(NamedTuple):
    searches: int
    width: int
    keep: int
    vocab: int
    block_size: int

    @property
    def rows(self) -> int:
        return self.searches * self.width

    @property
    def record(self) -> int:
        return 3 * self.keep + 1 + 5 * self.width

    @property
    def records(self) -> int:
        return self.searches * self.record

    def state(self, chance: random.Random) -> State:
        """Beams of any length, whose blocks were mixed before."""
        rows, columns = self.rows, chance.choice([5, 40, 70])
        length = chance.randint(1, columns * self.block_size - 4)
        numbers = list(range(rows * columns))
        chance.shuffle(numbers)
        own = torch.tensor(numbers, dtype=torch.int32).view(rows, columns)
        table = torch.full((rows, columns), POISON, dtype=torch.int32)
        last = (length - 1) // self.block_size
        for first in range(0, rows, self.width):
            for column in range(last + 1):
                order = list(range(first, first + self.width))
                if column == last:  # each beam's own
                    chance.shuffle(order)
                else:
                    order = chance.choices(order, k=self.width)
                table[first : first + self.width, column] = own[order, column]
        return State(
            own.cuda(),
            torch.full((rows, 8), -1, dtype=torch.int32, device="cuda"),
            torch.ones(rows, dtype=torch.int32, device="cuda"),
            torch.full((2, self.records + 3), POISON, dtype=torch.int32).pin_memory(),
            -3 * torch.rand(rows, device="cuda"),
            torch.full((rows,), POISON, device="cuda"),
            torch.full((rows,), length, dtype=torch.int32, device="cuda"),
            torch.full((rows,), chance.randint(0, 1), dtype=torch.int32, device="cuda"),
            table.cuda(),
            torch.full((rows, 2), POISON, dtype=torch.int32, device="cuda"),
        )

    def run(self, logits: Tensor, state: State, scratch: Scratch) -> None:
        kernel = torch.ops.lmi_multi.beams if logits.is_cuda else beams_kernel.beams
        assert kernel(logits, *self.given(state, scratch))
        torch.cuda.synchronize()

    def given(self, state: State, scratch: Scratch) -> tuple[Any, ...]:
        """The kernel's arguments behind the logits."""
        own = (self.width, self.keep, *state, self.block_size)
        return (*own, scratch.work, scratch.counters)

    def places(self, record: Tensor) -> list[int]:
        beams, tokens = record[self.keep : 3 * self.keep].view(2, self.keep)
        return [b * self.vocab + t for b, t in zip(beams.tolist(), tokens.tolist(), strict=True)]

    def check(self, record: Tensor, logits: Tensor, before: Tensor) -> bool:
        """One search's continuations beside the reference's; whether also their order is the
        same."""
        log_probs = logits.float().log_softmax(-1)
        group = Beams(tuple(before.tolist()), self.keep)
        scores, places = (part[0].cpu() for part in best_continuations(log_probs, [group]))
        count = len(scores)
        found, own = record[: self.keep].view(torch.float32), self.places(record)
        assert (found[count:] == -torch.inf).all()
        torch.testing.assert_close(found[:count], scores, atol=TOLERANCE, rtol=0)
        real = int((scores > -torch.inf).sum())
        assert len(set(own[:real])) == real
        total = (log_probs + before[:, None]).flatten().cpu()
        torch.testing.assert_close(found[:real], total[own[:real]], atol=TOLERANCE, rtol=0)
        for (first, a), (second, b) in itertools.pairwise(
            zip(found[:real].tolist(), own, strict=False)
        ):
            assert first > second or (first == second and a < b)
        return own[:real] == places[:real].tolist()


def scratch() -> Scratch:
    made = Scratch(torch.device("cuda"))
    made.work.fill_(torch.nan)
    return made


def logits_of(case: Case, dtype: torch.dtype, skipped: int) -> Tensor:
    """Rows that begin anywhere, with tokens that cannot come, ties, and unusable ones."""
    shape = (case.rows, case.vocab + 2 * skipped)
    logits = (3 * torch.randn(shape, device="cuda")).to(dtype)[:, skipped : skipped + case.vocab]
    logits[0, 3:] = -torch.inf
    if case.rows > 8:
        logits[8, case.vocab // 2 :] = logits[8].max()
    for row, value in zip((-1, -3 * case.width), (torch.nan, torch.inf), strict=True):
        if case.searches > 2:
            logits[row, case.vocab // 3] = value
    if case.searches > 4:
        logits[-2 * case.width] = -torch.inf
    return logits


def cases() -> Iterator[tuple[Case, int]]:
    chance = random.Random(0)
    for shape, skipped in itertools.product(SHAPES, (0, 3)):
        yield Case(*shape, block_size=chance.choice([1, 4, 16])), skipped


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_continuations_are_the_references(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    made, chance, alike = scratch(), random.Random(1), []
    for case, skipped in cases():
        state, logits = case.state(chance), logits_of(case, dtype, skipped)
        before, half = state.scores.clone(), int(state.turns[0])
        case.run(logits, state, made)
        assert not made.counters.any()
        assert (state.found[1 - half] == POISON).all()
        assert (state.found[half, case.records :] == POISON).all()
        records = state.found[half, : case.records].view(case.searches, -1)
        for number, record in enumerate(records):
            rows = slice(number * case.width, (number + 1) * case.width)
            finite = bool(torch.isfinite(logits[rows].amax(-1)).all())
            assert record[3 * case.keep] == finite
            if finite:
                alike.append(case.check(record, logits[rows], before[rows]))
            else:  # nobody reads them, but the next step must find tokens and beams
                assert all(0 <= place < case.width * case.vocab for place in case.places(record))
                assert ((state.ids[rows] >= 0) & (state.ids[rows] < case.vocab)).all()
    # torch ranks ties, which half types have, as it likes.
    assert sum(alike) > len(alike) * 0.9 or dtype != torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_beams_go_on_as_a_stand_in_lets_them(dtype: torch.dtype) -> None:
    """Several steps, each from what the last one left; with tokens that stop, and with rows that
    are none."""
    torch.manual_seed(2)
    made, chance, compared = scratch(), random.Random(2), 0
    for case, skipped in cases():
        state = case.state(chance)
        if case.searches > 3:
            state.live[-case.width :] = 0
        for _ in range(3):
            logits = logits_of(case, dtype, skipped).clamp(min=-1e4)
            for first in range(0, case.rows, case.width):
                likeliest = logits[first].float().nan_to_num(-99).topk(min(3, case.vocab))
                state.stops[first, : len(likeliest.indices)] = likeliest.indices.int()
            expected = state.copy()
            half = int(state.turns[0])
            case.run(logits, state, made)
            case.run(logits.cpu(), expected, made)
            left = slice(0, case.records)
            found, other = (
                own.found[half, left].view(case.searches, -1) for own in (state, expected)
            )
            usable = found[:, 3 * case.keep] > 0
            places = [case.places(record) for record in found]
            same = [
                not good or own == case.places(record)
                for good, own, record in zip(usable.tolist(), places, other, strict=True)
            ]
            for number in usable.nonzero().flatten().tolist():
                if not same[number]:
                    continue
                compared += 1
                rows = slice(number * case.width, (number + 1) * case.width)
                if not expected.live[rows.start]:
                    assert state.copies[rows.start, 0] == -1
                    continue
                for own, wanted in zip(state[4:], expected[4:], strict=True):
                    if own.dtype == torch.float32:
                        torch.testing.assert_close(
                            own[rows].cpu(), wanted[rows], atol=TOLERANCE, rtol=1e-6
                        )
                    else:
                        assert torch.equal(own[rows].cpu(), wanted[rows])
                told, wanted = found[number].clone(), other[number].clone()
                scores = 3 * case.keep + 1 + 2 * case.width
                for record in (told, wanted):  # compared already
                    record[: case.keep] = record[scores : scores + case.width] = 0
                assert torch.equal(told, wanted)
            if case.searches > 3 or not usable.all() or not all(same):
                break  # the stand-in's searches are not where the kernel's are
    assert compared > 40


def test_a_graph_goes_on_by_itself() -> None:
    """Replayed again and again on what it has left, with the kernel started early."""
    torch.manual_seed(3)
    case, chance, made = Case(8, 4, 8, 32128, 16), random.Random(3), scratch()
    state = case.state(chance)
    hidden = torch.randn(case.rows, 64, device="cuda", dtype=torch.bfloat16)
    head = torch.randn(64, case.vocab, device="cuda", dtype=torch.bfloat16)
    expected = state.copy()
    logits = hidden @ head
    given = case.given(state, made)
    torch.ops.lmi_multi.beams(logits, *given)
    torch.cuda.synchronize()
    for own, before in zip(state, expected, strict=True):
        own.copy_(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.lmi_multi.beams(torch.matmul(hidden, head, out=logits), *given)
    for _ in range(3):
        half = int(expected.turns[0])
        before = expected.scores.clone()
        graph.replay()
        torch.cuda.synchronize()
        case.run(logits.cpu(), expected, made)
        records = state.found[half, : case.records].view(case.searches, -1)
        for number, record in enumerate(records):
            rows = slice(number * case.width, (number + 1) * case.width)
            case.check(record, logits[rows], before[rows].cuda())
        expected = state.copy()  # also where ties have parted them


def test_what_the_kernel_does_not_cover_is_left_alone() -> None:
    made, chance = scratch(), random.Random(4)
    for case in (Case(1, 33, 8, 99, 4), Case(1, 4, 33, 99, 4)):
        state = case.state(chance)
        before = state.copy()
        logits = torch.randn(case.rows, case.vocab, device="cuda")
        assert not torch.ops.lmi_multi.beams(logits, *case.given(state, made))
        assert all(torch.equal(own.cpu(), old) for own, old in zip(state, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("layers", "blocks", "size", "heads", "dim"),
    [(1, 5, 1, 1, 8), (3, 40, 16, 12, 64), (24, 50, 16, 64, 64), (2, 30, 8, 3, 40)],
)
def test_blocks_are_copied_in_every_layer(
    dtype: torch.dtype, layers: int, blocks: int, size: int, heads: int, dim: int
) -> None:
    """And no others are touched; pairs that are none are skipped."""
    shape = (layers, 2, blocks, size, heads, dim)
    bits = torch.int32 if dtype.itemsize == 4 else torch.int16  # NaN among them must stay, too
    cache = torch.randint(-(2**15), 2**15, shape, device="cuda").to(bits).view(dtype)
    order = random.Random(5).sample(range(blocks), blocks)
    half = len(order) // 2
    pairs = [[a, b] for a, b in zip(order[:half], order[half:], strict=False)]
    pairs += [[-1, order[0]], [pairs[0][0], order[-1]] if blocks % 2 else [-1, -1]]
    expected = cache.view(bits).clone()
    for source, target in pairs:
        if source >= 0:
            expected[:, :, target] = cache.view(bits)[:, :, source]
    on_device = torch.tensor(pairs, dtype=torch.int32, device="cuda")
    assert torch.ops.lmi_multi.copy_blocks(cache, on_device)
    assert torch.equal(cache.view(bits), expected)
