"""Which blocks of the paged cache belong to whom."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container


class BlockAllocator:
    """Hands out the numbers 0 to `blocks` - 1; each belongs to one owner at a time.

    Blocks that follow each other are preferred: a row that lies in one piece can be read in
    place, without a gather.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free = list(range(blocks))  # ascending

    @property
    def free(self) -> int:
        """How many blocks are not taken."""
        return len(self._free)

    def take(self, count: int, owner: list[int]) -> None:
        """Append `count` free blocks to `owner`: in one piece those behind its last one, else the
        first ones, else the lowest.

        Raises ValueError if fewer are free: check `free` first. Here and in `give_back` the blocks
        change hands at once: an interrupt (Ctrl-C) leaves them on one side or the other.
        """
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free")
        start = self._behind(owner, count) if owner else None
        start = self._run(count) if start is None else start
        owner += self._free[start : start + count]
        del self._free[start : start + count]

    def give_back(self, owner: list[int], keep: Container[int] = ()) -> None:
        """Free the blocks in `owner` but for those to `keep`, and empty it.

        Raises ValueError, and frees none, if one is free already: it would get two owners, and
        one's text would reach the other's answer.
        """
        if len(set(owner)) < len(owner) or any(self._is_free(block) for block in owner):
            raise ValueError(f"not all of the blocks {owner} are taken")
        # Two runs: the sort merges them.
        merged = sorted(self._free + [block for block in owner if block not in keep])
        self._free, owner[:] = merged, []

    def _is_free(self, block: int) -> bool:
        at = bisect_left(self._free, block)
        return not 0 <= block < self.blocks or self._free[at : at + 1] == [block]

    def _behind(self, owner: list[int], count: int) -> int | None:
        """Where in the free list the `count` numbers after the owner's last one are, if there."""
        first = owner[-1] + 1
        at = bisect_left(self._free, first)
        return at if self._free[at : at + count] == list(range(first, first + count)) else None

    def _run(self, count: int) -> int:
        """Where in the free list the first `count` consecutive numbers begin; 0 if nowhere."""
        start = 0
        for i in range(1, len(self._free)):
            if i - start >= count:
                break
            if self._free[i] != self._free[i - 1] + 1:
                start = i
        return start if len(self._free) - start >= count else 0
