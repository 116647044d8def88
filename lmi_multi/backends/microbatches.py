"""A step's rows in parts, so that the stages of a pipeline work on several at the same time."""

from __future__ import annotations

from collections.abc import Sequence

from lmi_multi.engine.batch import Row

# Fewer tokens take as long as a few: reading the weights is what costs then, in every part anew.
TOKENS = 512


def micro_batches(rows: Sequence[Row], block_size: int, most: int) -> list[list[Row]]:
    """The same rows, in order, in parts of at most `most` tokens; a long row is cut.

    A part is computed before the next, on every stage: it must not read what a later one writes.
    Where rows would, all are one part.
    """
    if sum(len(row.token_ids) for row in rows) <= most or _reads_ahead(rows, block_size):
        return [list(rows)]
    parts: list[list[Row]] = [[]]
    room = most
    for row in rows:
        at = 0
        while at < len(row.token_ids):
            if not room:
                parts.append([])
                room = most
            ids = row.token_ids[at : at + room]
            parts[-1].append(row._replace(token_ids=ids, start=row.start + at))
            at += len(ids)
            room -= len(ids)
    return parts


def _reads_ahead(rows: Sequence[Row], block_size: int) -> bool:
    """Whether a row attends to a block that a later row writes."""
    writer = {}
    for i, row in enumerate(rows):
        for block in row.blocks[row.start // block_size : -(-row.length // block_size)]:
            writer[block] = i
    return any(
        writer.get(block, i) > i
        for i, row in enumerate(rows)
        for block in row.blocks[: -(-row.length // block_size)]
    )
