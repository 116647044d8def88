"""How the step kernel hands attention's results to the product behind it (csrc/hand.cuh) as a
model: blocks of a GPU that go on in any order, and two launches of it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

Word = tuple[int, int]  # set, place


class WrongWordError(Exception):
    """A word was lost that was still to be read, or one of another hand-over was read."""


@dataclass
class Launch:
    """Hand-overs of so many words each, in memory that launches share. What is not as the kernel
    has it is a mistake that the model has to find."""

    blocks: int
    counts: Sequence[int]
    words: dict[Word, int]
    barriers: bool = True
    at_once: bool = False  # words are taken away by the product that reads them
    cleared: bool = True  # and the last ones at the end
    arrived: dict[int, int] = field(default_factory=dict)

    def meet(self, barrier: int) -> Iterator[bool]:
        self.arrived[barrier] = self.arrived.get(barrier, 0) + 1
        while self.barriers and self.arrived[barrier] < self.blocks:
            yield False

    def forget(self, index: int, number: int) -> None:
        for place in range(index, max(self.counts), self.blocks):
            self.words.pop((number % 2, place), None)

    def block(self, index: int) -> Iterator[bool]:
        """What a block does; True where it has got on, False where it waits."""
        for number, count in enumerate(self.counts, 1):
            yield from self.meet(number)
            for place in range(index, count, self.blocks):  # attention
                if (number % 2, place) in self.words:
                    raise WrongWordError(f"{place} of {number} is there before it is written")
                self.words[number % 2, place] = number
                yield True
            if number > 1:
                self.forget(index, number - 1)
            for place in range(count):  # the product
                while (number % 2, place) not in self.words:
                    yield False
                if self.words[number % 2, place] != number:
                    raise WrongWordError(f"{place} of {self.words[number % 2, place]}")
                yield True
            if self.at_once:
                self.forget(index, number)
        yield from self.meet(0)
        if self.cleared:
            self.forget(index, len(self.counts))

    def run(self, chance: random.Random) -> None:
        """Let whoever may go on do so, in an order of chance: some are slow for a long time."""
        blocks = [self.block(index) for index in range(self.blocks)]
        weights = [chance.choice((1, 1, 20)) for _ in blocks]
        idle = 0
        while blocks:
            [number] = chance.choices(range(len(blocks)), weights)
            try:
                idle = 0 if next(blocks[number]) else idle + 1
            except StopIteration:
                del blocks[number], weights[number]
            if idle > 5_000:
                raise WrongWordError("a word was taken away that was still to be read")


def run_two(chance: random.Random, **mistake: Any) -> None:
    words: dict[Word, int] = {}
    for _ in range(2):
        counts = [chance.choice((1, 2, 6)) for _ in range(chance.choice((1, 4, 5)))]
        Launch(3, counts, words, **mistake).run(chance)
    assert not words


def test_no_word_is_lost() -> None:
    for seed in range(300):
        run_two(random.Random(seed))


@pytest.mark.parametrize("mistake", [{"barriers": False}, {"at_once": True}, {"cleared": False}])
def test_with_a_mistake_words_are_lost(mistake: dict[str, bool]) -> None:
    with pytest.raises((WrongWordError, AssertionError)):
        for seed in range(300):
            run_two(random.Random(seed), **mistake)
