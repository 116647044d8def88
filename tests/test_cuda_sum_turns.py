"""The step kernel's sums over peer memory as a model (csrc/meeting.cuh): blocks of several GPUs
that go on in any order, and words that are under way for as long as they like."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

WORDS = 6  # of the longest message


class WrongWordError(Exception):
    """A word was lost that was still to be read, or one of another sum was read."""


@dataclass
class Gpu:
    """An inbox by (set, sender, place), of which every block reads some words or all; and how many
    blocks have arrived at each barrier."""

    inbox: dict[tuple[int, int, int], int] = field(default_factory=dict)
    arrived: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    """Words of a sum, and whether every block takes them all (csrc/take.cuh) or its share."""

    words: int
    taken: bool


@dataclass
class Host:
    """GPUs that sum messages one after another. What is not as the kernel has it is a mistake that
    the model has to find."""

    ranks: int
    blocks: int
    messages: Sequence[Message]
    barriers: bool = True
    sets: int = 3
    behind: int = 1  # sums after which words are taken away
    gpus: list[Gpu] = field(init=False)
    under_way: list[tuple[int, tuple[int, int, int], int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gpus = [Gpu() for _ in range(self.ranks)]

    def block(self, rank: int, index: int) -> Iterator[bool]:
        """What a block does; True where it has got on, False where it waits."""
        own = self.gpus[rank]
        for number, message in enumerate(self.messages, 1):
            for place in range(index, message.words, self.blocks):  # the product
                for to in range(self.ranks):
                    key = (number % self.sets, rank, place)
                    self.under_way.append((to, key, number))
                    yield True
            for key in self.forgotten(index, number - self.behind):
                own.inbox[key] = 0
                yield True
            # Other words than it has sent, as other blocks have other shares.
            first, step = ((index + 1) % self.blocks, self.blocks) if not message.taken else (0, 1)
            for place in range(first, message.words, step):
                for sender in range(self.ranks):
                    key = (number % self.sets, sender, place)
                    while not own.inbox.get(key, 0):
                        yield False
                    if own.inbox[key] != number:
                        raise WrongWordError(f"{key} of sum {own.inbox[key]} in sum {number}")
                    yield True
            if self.barriers:
                own.arrived[number] = own.arrived.get(number, 0) + 1
                while own.arrived[number] < self.blocks:
                    yield False

    def forgotten(self, index: int, number: int) -> list[tuple[int, int, int]]:
        """A block's share of the words of a sum."""
        if number < 1:
            return []
        places = range(index, self.messages[number - 1].words, self.blocks)
        return [
            (number % self.sets, sender, place) for place in places for sender in range(self.ranks)
        ]

    def deliver(self, index: int) -> None:
        to, key, number = self.under_way.pop(index)
        if self.gpus[to].inbox.get(key, 0):
            raise WrongWordError(f"{key} on rank {to}")
        self.gpus[to].inbox[key] = number

    def run(self, chance: random.Random) -> None:
        """Let whoever may go on do so, in an order of chance: some are slow for a long time."""
        blocks = [self.block(r, b) for r in range(self.ranks) for b in range(self.blocks)]
        weights = [chance.choice((1, 1, 20)) for _ in blocks]
        idle = 0
        while blocks:
            if self.under_way and chance.random() < 0.5:
                self.deliver(chance.randrange(len(self.under_way)))
                continue
            [number] = chance.choices(range(len(blocks)), weights)
            try:
                idle = 0 if next(blocks[number]) else idle + 1
            except StopIteration:
                del blocks[number], weights[number]
            if idle > 10_000 and not self.under_way:
                raise WrongWordError("a word was taken away that was still to be read")
        assert not self.under_way
        left = {key[0] for gpu in self.gpus for key, number in gpu.inbox.items() if number}
        assert left == {len(self.messages) % self.sets}  # the last sum's alone


def messages(chance: random.Random) -> list[Message]:
    """Of changing lengths, as programs of other rows follow each other."""
    return [Message(chance.choice((1, 2, WORDS)), chance.random() < 0.5) for _ in range(8)]


@pytest.mark.parametrize(("ranks", "blocks"), [(2, 1), (2, 3), (3, 2)])
def test_no_word_is_lost(ranks: int, blocks: int) -> None:
    for seed in range(150):
        chance = random.Random(seed)
        Host(ranks, blocks, messages(chance)).run(chance)


@pytest.mark.parametrize(
    "mistake",
    [{"barriers": False}, {"sets": 2}, {"behind": 0}, {"behind": 2}],
    ids=lambda mistake: "-".join(map(str, *mistake.items())),
)
def test_with_a_mistake_words_are_lost(mistake: dict[str, Any]) -> None:
    with pytest.raises(WrongWordError):
        for seed in range(150):
            chance = random.Random(seed)
            Host(2, 3, messages(chance), **mistake).run(chance)
