"""Which blocks of the paged cache belong to whom."""

from __future__ import annotations

from bisect import bisect_left


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
        """Append the first `count` free blocks in one piece to `owner`, else the lowest ones.

        Raises ValueError if fewer are free: check `free` first. Here and in `give_back` the blocks
        change hands at once: an interrupt (Ctrl-C) leaves them on one side or the other.
        """
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free")
        start = self._run(count)
        owner += self._free[start : start + count]
        del self._free[start : start + count]

    def give_back(self, owner: list[int]) -> None:
        """Free the blocks in `owner`, and empty it.

        Raises ValueError, and frees none, if one is free already: it would get two owners, and
        one's text would reach the other's answer.
        """
        if len(set(owner)) < len(owner) or any(self._is_free(block) for block in owner):
            raise ValueError(f"not all of the blocks {owner} are taken")
        merged = sorted(self._free + owner)  # two runs: the sort merges them
        self._free, owner[:] = merged, []

    def _is_free(self, block: int) -> bool:
        at = bisect_left(self._free, block)
        return not 0 <= block < self.blocks or self._free[at : at + 1] == [block]

    def _run(self, count: int) -> int:
        """Where in the free list the first `count` consecutive numbers begin; 0 if nowhere."""
        start = 0
        for i in range(1, len(self._free)):
            if i - start >= count:
                break
            if self._free[i] != self._free[i - 1] + 1:
                start = i
        return start if len(self._free) - start >= count else 0
