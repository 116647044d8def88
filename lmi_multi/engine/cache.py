"""Which blocks of the paged cache belong to whom."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Sequence
from operator import attrgetter

_start = attrgetter("start")


class BlockAllocator:
    """Hands out the numbers 0 to `blocks` - 1; each belongs to one owner at a time.

    Blocks that follow each other are preferred: a row that lies in one piece can be read in
    place, without a gather. Free ones are kept as such pieces, of which there are few: a cache can
    have a hundred thousand blocks, and answers must not begin and end the slower for it.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = self.free = blocks  # all of them, and how many are not taken
        self._pieces = [range(blocks)] if blocks else []  # ascending; none touches the next

    def take(self, count: int, owner: list[int]) -> None:
        """Append `count` free blocks to `owner`: in one piece those behind its last one, else the
        first ones, else the lowest.

        Raises ValueError if fewer are free: check `free` first. Here and in `give_back` the blocks
        change hands at once: an interrupt (Ctrl-C) leaves them on one side or the other.
        """
        if count > self.free:
            raise ValueError(f"{count} blocks wanted, {self.free} free")
        pieces = self._pieces.copy()
        first = last = self._place(count, owner)
        taken: list[int] = []
        rest = range(0)
        while len(taken) < count:
            missing = count - len(taken)
            taken += pieces[last][:missing]
            rest = pieces[last][missing:]
            last += 1
        pieces[first:last] = [rest] if rest else []
        self._pieces, self.free, owner[:] = pieces, self.free - count, [*owner, *taken]

    def give_back(self, owner: list[int], keep: Container[int] = ()) -> None:
        """Free the blocks in `owner` but for those to `keep`, and empty it.

        Raises ValueError, and frees none, if one is free already: it would get two owners, and
        one's text would reach the other's answer.
        """
        given = sorted(owner)
        if len(set(given)) < len(given) or any(map(self._is_free, _in_pieces(given))):
            raise ValueError(f"not all of the blocks {owner} are taken")
        freed = [block for block in given if block not in keep]
        pieces = self._pieces.copy()
        for piece in _in_pieces(freed):
            _add(piece, pieces)
        self._pieces, self.free, owner[:] = pieces, self.free + len(freed), []

    def _is_free(self, piece: range) -> bool:
        """Whether one of these blocks is free, or there is no such block."""
        before = bisect_left(self._pieces, piece.stop, key=_start)
        meets = before > 0 and self._pieces[before - 1].stop > piece.start
        return meets or piece.start < 0 or piece.stop > self.blocks

    def _place(self, count: int, owner: list[int]) -> int:
        """The free piece that `count` blocks for `owner` begin in."""
        pieces = self._pieces
        if owner:
            behind = bisect_left(pieces, owner[-1] + 1, key=_start)
            wanted = range(owner[-1] + 1, owner[-1] + 1 + count)
            if behind < len(pieces) and pieces[behind][:count] == wanted:
                return behind
        return next((i for i, piece in enumerate(pieces) if len(piece) >= count), 0)


def _in_pieces(blocks: Sequence[int]) -> list[range]:
    """Ascending numbers as pieces, none of which touches the next."""
    if blocks and blocks[-1] - blocks[0] == len(blocks) - 1:  # most often
        return [range(blocks[0], blocks[-1] + 1)]
    pieces: list[range] = []
    for block in blocks:
        if pieces and pieces[-1].stop == block:
            pieces[-1] = range(pieces[-1].start, block + 1)
        else:
            pieces.append(range(block, block + 1))
    return pieces


def _add(piece: range, pieces: list[range]) -> None:
    """Put `piece` among `pieces`, as one with those that it touches."""
    first = last = bisect_left(pieces, piece.start, key=_start)
    start, stop = piece.start, piece.stop
    if first and pieces[first - 1].stop == start:
        first -= 1
        start = pieces[first].start
    if last < len(pieces) and pieces[last].start == stop:
        stop = pieces[last].stop
        last += 1
    pieces[first:last] = [range(start, stop)]
