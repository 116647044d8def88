"""The block allocator: every block has at most one owner, and none is ever lost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from lmi_multi.engine import cache
from lmi_multi.engine.cache import BlockAllocator


class Allocations(RuleBasedStateMachine):
    """Takes and returns in any order, against a model that knows every owner."""

    taken: Bundle[list[int]] = Bundle("taken")

    @initialize(blocks=st.integers(0, 12))
    def start(self, blocks: int) -> None:
        self.allocator = BlockAllocator(blocks)
        self.owned: list[int] = []

    @rule(target=taken, data=st.data())
    def take(self, data: st.DataObject) -> list[int]:
        count = data.draw(st.integers(0, self.allocator.free))
        blocks: list[int] = []
        self.allocator.take(count, blocks)
        assert len(blocks) == count
        self.owned += blocks
        return blocks

    @rule(blocks=consumes(taken))
    def give_back(self, blocks: list[int]) -> None:
        given = list(blocks)
        self.allocator.give_back(blocks)
        assert blocks == []
        self.owned = [block for block in self.owned if block not in given]

    @rule(more=st.integers(1, 5))
    def take_too_many(self, more: int) -> None:
        with pytest.raises(ValueError, match="blocks wanted"):
            self.allocator.take(self.allocator.free + more, [])

    @precondition(lambda self: self.allocator.free)
    @rule()
    def give_back_what_is_free(self) -> None:
        owner: list[int] = []
        self.allocator.take(1, owner)
        again = list(owner)
        self.allocator.give_back(owner)
        with pytest.raises(ValueError, match="are taken"):
            self.allocator.give_back(again)

    @rule(block=st.sampled_from([-1, 10_000]))
    def give_back_what_does_not_exist(self, block: int) -> None:
        with pytest.raises(ValueError, match="are taken"):
            self.allocator.give_back([block])

    @invariant()
    def nothing_is_lost_or_shared(self) -> None:
        if not hasattr(self, "owned"):
            return
        assert len(set(self.owned)) == len(self.owned)
        assert set(self.owned) <= set(range(self.allocator.blocks))
        assert self.allocator.free == self.allocator.blocks - len(self.owned)


TestAllocations = Allocations.TestCase
TestAllocations.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def taken(allocator: BlockAllocator, count: int) -> list[int]:
    blocks: list[int] = []
    allocator.take(count, blocks)
    return blocks


def test_a_fresh_pool_is_used_front_to_back() -> None:
    allocator = BlockAllocator(5)
    assert taken(allocator, 2) == [0, 1]
    assert taken(allocator, 3) == [2, 3, 4]


@given(st.integers(1, 16), st.data())
def test_blocks_in_one_piece_come_first(blocks: int, data: st.DataObject) -> None:
    allocator = BlockAllocator(blocks)
    taken(allocator, blocks)
    free = data.draw(st.lists(st.integers(0, blocks - 1), unique=True))
    allocator.give_back(list(free))
    count = data.draw(st.integers(0, len(free)))
    pieces = [first for first in sorted(free) if set(range(first, first + count)) <= set(free)]
    expected = list(range(pieces[0], pieces[0] + count)) if pieces else sorted(free)[:count]
    assert taken(allocator, count) == expected


@given(st.integers(2, 16), st.data())
def test_blocks_behind_the_owners_last_one_come_before_others(
    blocks: int, data: st.DataObject
) -> None:
    allocator = BlockAllocator(blocks)
    owner = taken(allocator, blocks)
    others = data.draw(st.lists(st.integers(1, blocks - 1), unique=True))
    owner = [block for block in owner if block not in others]
    allocator.give_back(list(others))
    owner = owner[: data.draw(st.integers(1, len(owner)))]
    count = data.draw(st.integers(0, len(others)))
    behind = [*range(owner[-1] + 1, owner[-1] + 1 + count)]
    again = BlockAllocator(blocks)
    taken(again, blocks)
    again.give_back(list(others))
    expected = behind if set(behind) <= set(others) else taken(again, count)
    before = list(owner)
    allocator.take(count, owner)
    assert owner == before + expected


def test_what_a_block_costs_does_not_depend_on_how_many_there_are() -> None:
    """These would not even be listed in memory."""
    allocator = BlockAllocator(10**13)
    first, second = taken(allocator, 3), taken(allocator, 2)
    allocator.give_back(first)
    assert taken(allocator, 4) == [5, 6, 7, 8]
    allocator.give_back(second)
    assert allocator.free == 10**13 - 4
    assert taken(allocator, 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("gives", [False, True], ids=["take", "give_back"])
def test_an_interrupt_leaves_blocks_on_one_side_or_the_other(gives: bool) -> None:
    """At every line of the allocator's: free blocks and owners' are all there are, once each."""
    for line in range(1, 1000):
        allocator = BlockAllocator(12)
        owners = [taken(allocator, count) for count in (2, 3, 2, 1)]
        allocator.give_back(owners[1])
        owner = owners.pop()
        owner += owners.pop(0)  # several pieces, of which one lies between free ones
        work = partial(*(allocator.give_back, owner) if gives else (allocator.take, 5, owner))
        ended = interrupted(work, line)
        free = [block for piece in allocator._pieces for block in piece]
        assert sorted([*free, *owner, *(b for own in owners for b in own)]) == list(range(12))
        assert allocator.free == len(free)
        if ended:
            assert line > 10
            return
    pytest.fail("it did not end")


def interrupted(work: Callable[[], object], line: int) -> bool:
    """Ctrl-C at so many lines of the allocator's code; whether it had ended before."""
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if frame.f_code.co_filename != cache.__file__:
            return None
        seen += 1
        if seen == line:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
        return True
    except KeyboardInterrupt:
        return False
    finally:
        sys.settrace(before)


def test_a_failed_return_changes_nothing() -> None:
    allocator = BlockAllocator(4)
    blocks = taken(allocator, 2)
    for wrong in ([*blocks, 3], [0, 0]):
        before = list(wrong)
        with pytest.raises(ValueError, match=r"not all of the blocks \[0, .*\] are taken"):
            allocator.give_back(wrong)
        assert wrong == before and allocator.free == 2
    allocator.give_back(blocks)
    assert taken(allocator, 4) == [0, 1, 2, 3]
