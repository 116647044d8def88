"""The step kernel's sums over peer memory as a model (csrc/sum.cuh): blocks of several GPUs that go
on in any order, and words that are under way for as long as they like."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

WORDS = 6  # of the longest message


class WrongWordError(Exception):
    """A word was overwritten that was still to be read, or one of another sum was taken."""


@dataclass
class Gpu:
    """An inbox by (turn, sender, place), and how many blocks have arrived at each barrier."""

    inbox: dict[tuple[int, int, int], int] = field(default_factory=dict)
    arrived: dict[int, int] = field(default_factory=dict)


@dataclass
class Host:
    """GPUs that sum messages of so many words, one after another."""

    ranks: int
    blocks: int
    messages: Sequence[int]
    barriers: bool  # False: the mistake that the model has to find
    gpus: list[Gpu] = field(init=False)
    under_way: list[tuple[int, tuple[int, int, int], int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gpus = [Gpu() for _ in range(self.ranks)]

    def block(self, rank: int, index: int) -> Iterator[bool]:
        """What a block does; True where it has got on, False where it waits."""
        own = self.gpus[rank]
        for mark, words in enumerate(self.messages, 1):
            for place in range(index, words, self.blocks):  # the product
                for to in range(self.ranks):
                    self.under_way.append((to, (mark % 2, rank, place), mark))
                    yield True
            # Other words than it has sent, as other blocks have other shares.
            for place in range((index + 1) % self.blocks, words, self.blocks):
                for sender in range(self.ranks):
                    key = (mark % 2, sender, place)
                    while own.inbox.get(key, 0) != mark:
                        yield False
                    own.inbox[key] = 0
                    yield True
            if self.barriers:
                own.arrived[mark] = own.arrived.get(mark, 0) + 1
                while own.arrived[mark] < self.blocks:
                    yield False

    def deliver(self, index: int) -> None:
        to, key, mark = self.under_way.pop(index)
        if self.gpus[to].inbox.get(key, 0):
            raise WrongWordError(f"{key} on rank {to}")
        self.gpus[to].inbox[key] = mark

    def run(self, chance: random.Random) -> None:
        """Let whoever may go on do so, in an order of chance: some are slow for a long time."""
        blocks = [self.block(r, b) for r in range(self.ranks) for b in range(self.blocks)]
        weights = [chance.choice((1, 1, 20)) for _ in blocks]
        while blocks:
            if self.under_way and chance.random() < 0.5:
                self.deliver(chance.randrange(len(self.under_way)))
                continue
            [number] = chance.choices(range(len(blocks)), weights)
            try:
                next(blocks[number])
            except StopIteration:
                del blocks[number], weights[number]
        assert not self.under_way
        assert not any(mark for gpu in self.gpus for mark in gpu.inbox.values())


def messages(chance: random.Random) -> list[int]:
    """Of changing lengths, as programs of other rows follow each other."""
    return [chance.choice((1, 2, WORDS)) for _ in range(8)]


@pytest.mark.parametrize(("ranks", "blocks"), [(2, 1), (2, 3), (3, 2)])
def test_no_word_is_overwritten_that_is_to_be_read(ranks: int, blocks: int) -> None:
    for seed in range(150):
        chance = random.Random(seed)
        Host(ranks, blocks, messages(chance), barriers=True).run(chance)


def test_without_barriers_words_are_lost() -> None:
    with pytest.raises(WrongWordError):
        for seed in range(150):
            chance = random.Random(seed)
            Host(2, 3, messages(chance), barriers=False).run(chance)
