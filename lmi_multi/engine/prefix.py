"""Prefix caching: prompts that begin alike share the blocks of what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from lmi_multi.engine.cache import BlockAllocator

_ROOT = -1  # the parent of a prompt's first block
_Key = tuple[int, tuple[int, ...]]


class PrefixCache:
    """Blocks by the tokens in them and before them, over the allocator that they come from.

    A full block of a prompt is known by its tokens and by the block before it, so that equal keys
    mean equal prompts up to there, and keys and values that are equal too. It has any number of
    users; once it has none it lies idle, until a prompt finds it again or its place is needed.
    Whoever uses a block uses all before it, and ends with them later: so the one that has been
    idle longest has no block after it.

    Users are told apart by the identity of the list that holds their blocks. Everything here can
    be interrupted (Ctrl-C) and done once more.
    """

    def __init__(self, blocks: int, block_size: int, enabled: bool = True) -> None:
        self._allocator = BlockAllocator(blocks)
        self._size = block_size
        self.enabled = enabled
        self._blocks: dict[_Key, int] = {}
        self._keys: dict[int, _Key] = {}
        self._users: dict[int, set[int]] = {}
        self._idle: dict[int, None] = {}  # in the order in which they became so
        self._leaving: list[int] = []  # from idle to free

    @property
    def free(self) -> int:
        """How many blocks nobody uses."""
        return self._allocator.free + len(self._idle)

    def find(self, tokens: Sequence[int]) -> list[int]:
        """The blocks that hold a beginning of `tokens`, but never the last of them: somebody has
        to compute what comes next."""
        if self._leaving:
            self._evict(0)
        found: list[int] = []
        for start in range(0, len(tokens) - self._size, self._size):
            key = (found[-1] if found else _ROOT, tuple(tokens[start : start + self._size]))
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def fits(self, count: int, shared: Sequence[int]) -> bool:
        """Whether `count` blocks could be taken beside those `shared`."""
        return count <= self.free - sum(block in self._idle for block in shared)

    def share(self, blocks: Sequence[int], owner: list[int]) -> None:
        """Append `blocks`, which `find` has found, to `owner`."""
        owner += blocks
        for block in blocks:
            self._users[block].add(id(owner))
            self._idle.pop(block, None)

    def take(self, count: int, owner: list[int]) -> None:
        """Append `count` blocks that nobody uses to `owner`.

        Raises ValueError if there are fewer: ask `fits` first.
        """
        if self._leaving or count > self._allocator.free:
            self._evict(count - self._allocator.free)
        self._allocator.take(count, owner)

    def store(self, tokens: Sequence[int], owner: list[int]) -> None:
        """Make known that the blocks of `owner` hold `tokens`, as far as these fill blocks."""
        if not self.enabled:
            return
        parent = _ROOT
        for place in range(len(tokens) // self._size):
            key = (parent, tuple(tokens[place * self._size : (place + 1) * self._size]))
            block = owner[place]
            if self._keys.get(block) is None:
                if key in self._blocks:  # somebody else's: nothing follows from a second one
                    return
                self._users.setdefault(block, set()).add(id(owner))
                self._keys[block] = key
            self._blocks[self._keys[block]] = parent = block

    def give_back(self, owner: list[int]) -> None:
        """Give up what `owner` has, and empty it. What is known stays until its place is needed.

        Raises ValueError, and frees none, if one is free already.
        """
        if not owner:  # as each one's is at the end of a call, which gives up what may be left
            return
        for block in reversed(owner):  # the last one becomes idle, and is evicted, first
            users = self._users.get(block)
            if users is not None:
                users.discard(id(owner))
                if not users:
                    self._idle[block] = None
        self._allocator.give_back(owner, keep=self._users)

    def _evict(self, count: int) -> None:
        """Forget and free the blocks that have been idle longest."""
        self._leaving += [*islice(self._idle, max(count - len(self._leaving), 0))]
        for block in self._leaving:
            key = self._keys.pop(block, None)
            if key is not None:
                self._blocks.pop(key, None)
            self._users.pop(block, None)
            self._idle.pop(block, None)
        self._allocator.give_back(self._leaving)
