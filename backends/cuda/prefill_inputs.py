"""What a prefill reads beside weights and cache: packed rows, as one buffer and one copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lmi_multi.engine.batch import Prompt, Row

from .inputs import upload

# Keys of a token, on average, from which on Hopper's own kernel is the faster one; half as many of
# wide heads, for which the other one's tiles are small.
MANY_KEYS, WIDE = 256, 128
NOWHERE, NOTHING = -1, -1  # a slot that is none; a tile without work

Integers = npt.NDArray[np.int32]


class Tiling(NamedTuple):
    """Which attention kernel, and how many queries of a row one of its blocks does. `many`: the one
    for many keys (csrc/prefill_long.cuh), else csrc/prefill.cuh."""

    queries: int
    many: bool = False


SMALL, LARGE, LONG = Tiling(64), Tiling(128), Tiling(128, many=True)


class PrefillInputs:
    """Room for `tokens` packed tokens of up to `rows` rows, all int32 on the device.

    Of each token: `ids`, `positions`, `reach` (the context that its row has), and `slots` in the
    cache, block * block_size + offset, -1 for none. Of each row: where its tokens begin, `starts`
    [rows + 1], how many keys it has, `lengths`, and its blocks, `table` [rows, width]; the same of
    its encoded prompt, `cross_lengths` and `cross_table`. `last`: the last tokens of the rows that
    draw, which come first. `tiles` [n, 2], as `tiling` has them: a row and the first of its
    queries, or -1.

    What is not filled computes nothing, and nothing is stored for it.
    """

    def __init__(
        self,
        tokens: int,
        rows: int,
        width: int,
        cross_width: int,
        device: torch.device,
        tiling: Tiling = SMALL,
    ) -> None:
        self.tiling = tiling
        shapes = {
            **dict.fromkeys(("ids", "positions", "reach", "slots"), (tokens,)),
            "starts": (rows + 1,),
            **dict.fromkeys(("lengths", "cross_lengths", "last"), (rows,)),
            "tiles": (tokens // tiling.queries + rows, 2),
            "table": (rows, width),
            "cross_table": (rows, cross_width),
        }
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        self._host = np.zeros(sum(sizes), dtype=np.int32)
        self._packed = torch.empty(sum(sizes), dtype=torch.int32, device=device)
        host = np.split(self._host, np.cumsum(sizes)[:-1])
        parts = self._packed.split_with_sizes(sizes)
        self.host: dict[str, Integers] = {
            name: own.reshape(shape)
            for (name, shape), own in zip(shapes.items(), host, strict=True)
        }
        views = {
            name: own.view(shape) for (name, shape), own in zip(shapes.items(), parts, strict=True)
        }
        self.ids, self.positions = views["ids"], views["positions"]
        self.reach, self.slots = views["reach"], views["slots"]
        self.starts, self.lengths, self.table = views["starts"], views["lengths"], views["table"]
        self.cross_lengths, self.cross_table = views["cross_lengths"], views["cross_table"]
        self.last, self.tiles = views["last"], views["tiles"]

    @classmethod
    def of_rows(
        cls, rows: Sequence[Row], block_size: int, device: torch.device, tiling: Tiling = SMALL
    ) -> PrefillInputs:
        """Of a decoder's rows, and no larger."""
        width = max(-(-row.length // block_size) for row in rows)
        cross_width = max(len(row.cross_blocks) for row in rows)
        tokens = sum(len(row.token_ids) for row in rows)
        made = cls(tokens, len(rows), width, cross_width, device, tiling)
        made.fill_rows(rows, block_size)
        return made

    @classmethod
    def of_prompts(
        cls,
        prompts: Sequence[Prompt],
        block_size: int,
        device: torch.device,
        tiling: Tiling = SMALL,
    ) -> PrefillInputs:
        """Of prompts that attend to themselves, and no larger."""
        tokens = sum(len(prompt.token_ids) for prompt in prompts)
        made = cls(tokens, len(prompts), 0, 0, device, tiling)
        made.fill_prompts(prompts, block_size)
        return made

    def fill_rows(self, rows: Sequence[Row], block_size: int) -> None:
        """A decoder's rows, which continue what the cache has of them."""
        host = self.host
        self._clear()
        lengths = [row.length for row in rows]
        for i, row in enumerate(rows):
            used = -(-row.length // block_size)
            host["table"][i, :used] = row.blocks[:used]
            host["cross_lengths"][i] = row.cross_length
            host["cross_table"][i, : len(row.cross_blocks)] = row.cross_blocks
        reach = [max(row.length, row.prompt_length) for row in rows]
        own = self._fill_tokens([row.token_ids for row in rows], lengths, reach)
        self._fill_slots(own, host["table"], block_size)
        last = [
            end - 1
            for row, end in zip(rows, host["starts"][1:].tolist(), strict=False)
            if row.sample is not None
        ]
        host["last"][: len(last)] = last
        upload(self._host, self._packed)

    def fill_prompts(self, prompts: Sequence[Prompt], block_size: int) -> None:
        """Prompts that attend to themselves; slots are those of their cross-attention."""
        self._clear()
        lengths = [len(prompt.token_ids) for prompt in prompts]
        own = self._fill_tokens([prompt.token_ids for prompt in prompts], lengths, lengths)
        if any(prompt.cross_blocks for prompt in prompts):
            width = -(-max(lengths) // block_size)
            table = np.full((len(prompts), width), NOWHERE, dtype=np.int32)
            for i, prompt in enumerate(prompts):
                table[i, : len(prompt.cross_blocks)] = prompt.cross_blocks[:width]
            self._fill_slots(own, table, block_size)
        upload(self._host, self._packed)

    def clear(self) -> None:
        """No rows at all."""
        self._clear()
        upload(self._host, self._packed)

    def _clear(self) -> None:
        self._host[:] = 0
        self.host["slots"][:] = NOWHERE
        self.host["tiles"][:] = NOTHING

    def _fill_tokens(
        self, ids: Sequence[Sequence[int]], lengths: Sequence[int], reach: Sequence[int]
    ) -> Integers:
        """The last tokens, with these `ids`, of rows of these `lengths`; the row of each token."""
        host, counts = self.host, [len(own) for own in ids]
        ends = np.cumsum(counts)
        total = ends[-1]
        begin = 0
        for own, count in zip(ids, counts, strict=True):
            host["ids"][begin : begin + count] = own
            begin += count
        host["positions"][:total] = np.arange(total) + np.repeat(lengths - ends, counts)
        host["reach"][:total] = np.repeat(reach, counts)
        host["starts"][1 : len(counts) + 1] = ends
        host["starts"][len(counts) + 1 :] = total
        host["lengths"][: len(counts)] = lengths
        found = tiles(counts, lengths, self.tiling.queries)
        host["tiles"][: len(found)] = found
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    def _fill_slots(self, rows: Integers, table: Integers, block_size: int) -> None:
        """Where the tokens lie, which are of these `rows` of a table of blocks; NOWHERE is none."""
        positions = self.host["positions"][: len(rows)]
        blocks, offsets = np.divmod(positions, block_size)
        found = table[rows, blocks] * block_size + offsets
        np.maximum(found, NOWHERE, out=self.host["slots"][: len(rows)])


def tiles(counts: Sequence[int], lengths: Sequence[int], queries: int) -> list[tuple[int, int]]:
    """The rows' tiles: (row, first query of up to `queries`), those that see most keys first, so
    that no long one is left for the end."""
    found = [(row, first) for row, n in enumerate(counts) for first in range(0, n, queries)]
    return sorted(found, key=lambda tile: counts[tile[0]] - lengths[tile[0]] - tile[1])


def tiling_of(
    counts: Sequence[int],
    lengths: Sequence[int],
    heads: int,
    dim: int,
    processors: int,
    long: bool,
) -> Tiling:
    """For rows of so many new tokens and keys. Large tiles, with which keys are read half as often,
    where that leaves each of the GPU's processors some blocks, and heads are narrow enough.
    `long`: whether there is a kernel for many keys."""
    if long and have_many_keys(counts, lengths, dim):
        return LONG
    blocks = heads * sum(-(-n // LARGE.queries) for n in counts)
    return LARGE if dim <= WIDE and blocks >= 4 * processors else SMALL


def have_many_keys(counts: Sequence[int], lengths: Sequence[int], dim: int) -> bool:
    """Whether rows of so many new tokens and keys are work for the kernel that is for many keys: on
    average over tokens, as if there were no windows."""
    keys = sum(n * length for n, length in zip(counts, lengths, strict=True))
    return keys >= (MANY_KEYS if dim <= WIDE else MANY_KEYS // 2) * sum(counts)
