"""What a prefill reads beside weights and cache: packed rows, as one buffer and one copy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
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


SHORT, LONG = Tiling(64), Tiling(128, many=True)


class PrefillInputs:
    """Room for `tokens` packed tokens of up to `rows` rows, all int32 on the device.

    Of each token `ids`. Of each row: where its tokens begin, `starts` [rows + 1], how many keys it
    has, `lengths`, the context that it `reached`, and its blocks, `table` [rows, width]: of a
    prompt those of its cross-attention, NOWHERE for none. What a decoder's row has of its encoded
    prompt: `cross_lengths` and `cross_table`. `last`: the last tokens of the rows that draw, which
    come first. `tiles` [n, 2], as `tiling` has them: a row and the first of its queries, or -1.

    From these `lay_out` makes what a step reads of each token: `positions`, `reach` (its row's
    context), and `slots` in the cache, block * block_size + offset, -1 for none.

    What is not filled computes nothing, and nothing is stored for it.
    """

    def __init__(
        self,
        tokens: int,
        rows: int,
        width: int,
        cross_width: int,
        block_size: int,
        device: torch.device,
        tiling: Tiling = SHORT,
    ) -> None:
        self.tiling, self.block_size = tiling, block_size
        shapes = {
            "ids": (tokens,),
            "starts": (rows + 1,),
            **dict.fromkeys(("lengths", "reached", "cross_lengths", "last"), (rows,)),
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
        self.ids, self.last, self.tiles = views["ids"], views["last"], views["tiles"]
        self.starts, self.lengths, self.table = views["starts"], views["lengths"], views["table"]
        self._reached = views["reached"]
        self.cross_lengths, self.cross_table = views["cross_lengths"], views["cross_table"]
        places = torch.empty((3, tokens), dtype=torch.int32, device=device)
        self.positions, self.reach, self.slots = places.unbind(0)

    @classmethod
    def of_rows(
        cls, rows: Sequence[Row], block_size: int, device: torch.device, tiling: Tiling = SHORT
    ) -> PrefillInputs:
        """Of a decoder's rows, and no larger; laid out."""
        width = max(-(-row.length // block_size) for row in rows)
        cross_width = max(len(row.cross_blocks) for row in rows)
        tokens = sum(len(row.token_ids) for row in rows)
        made = cls(tokens, len(rows), width, cross_width, block_size, device, tiling)
        made.fill_rows(rows)
        made.lay_out()
        return made

    @classmethod
    def of_prompts(
        cls,
        prompts: Sequence[Prompt],
        block_size: int,
        device: torch.device,
        tiling: Tiling = SHORT,
    ) -> PrefillInputs:
        """Of prompts that attend to themselves, and no larger; laid out."""
        tokens = sum(len(prompt.token_ids) for prompt in prompts)
        width = -(-max(len(prompt.token_ids) for prompt in prompts) // block_size)
        made = cls(tokens, len(prompts), width, 0, block_size, device, tiling)
        made.fill_prompts(prompts)
        made.lay_out()
        return made

    def fill_rows(self, rows: Sequence[Row]) -> None:
        """A decoder's rows, which continue what the cache has of them."""
        host, lengths = self.host, [row.length for row in rows]
        ends = self._fill([row.token_ids for row in rows], lengths)
        for i, row in enumerate(rows):
            used = -(-row.length // self.block_size)
            host["table"][i, :used] = row.blocks[:used]
            if row.cross_blocks:
                host["cross_table"][i, : len(row.cross_blocks)] = row.cross_blocks
        host["cross_lengths"][: len(rows)] = [row.cross_length for row in rows]
        host["reached"][: len(rows)] = [max(row.length, row.prompt_length) for row in rows]
        last = [end - 1 for row, end in zip(rows, ends, strict=True) if row.sample is not None]
        host["last"][: len(last)] = last
        upload(self._host, self._packed)

    def fill_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Prompts that attend to themselves; slots are those of their cross-attention."""
        host, lengths = self.host, [len(prompt.token_ids) for prompt in prompts]
        self._fill([prompt.token_ids for prompt in prompts], lengths)
        host["reached"][: len(prompts)] = lengths
        host["table"][:] = NOWHERE
        for i, prompt in enumerate(prompts):
            own = prompt.cross_blocks[: -(-lengths[i] // self.block_size)]
            host["table"][i, : len(own)] = own
        upload(self._host, self._packed)

    def clear(self) -> None:
        """No rows at all."""
        self._host[:] = 0
        self.host["tiles"][:] = NOTHING
        upload(self._host, self._packed)
        self.lay_out()

    def lay_out(self) -> None:
        """Find each token's place, on the device, by what was filled in."""
        done = torch.ops.lmi_multi.lay_out(
            *(self.starts, self.lengths, self._reached, self.table, self.block_size),
            *(self.positions, self.reach, self.slots),
        )
        if not done:
            raise ValueError("a prefill of no tokens")

    def _fill(self, ids: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[int]:
        """The last tokens, with these `ids`, of rows of these `lengths`; where each row's end.

        What the last prefill has left beyond them is read by nothing that counts."""
        host, counts = self.host, [len(own) for own in ids]
        ends = list(accumulate(counts))
        begin = 0
        for own, end in zip(ids, ends, strict=True):
            host["ids"][begin:end] = own
            begin = end
        host["starts"][1 : len(ends) + 1] = ends
        host["starts"][len(ends) + 1 :] = ends[-1]
        host["lengths"][: len(ends)] = lengths
        found = tiles(counts, lengths, self.tiling.queries)
        host["tiles"][: len(found)] = found
        host["tiles"][len(found) :] = NOTHING
        return ends


def tiles(counts: Sequence[int], lengths: Sequence[int], queries: int) -> list[tuple[int, int]]:
    """The rows' tiles: (row, first query of up to `queries`), those that see most keys first, so
    that no long one is left for the end."""
    found = [(row, first) for row, n in enumerate(counts) for first in range(0, n, queries)]
    return sorted(found, key=lambda tile: counts[tile[0]] - lengths[tile[0]] - tile[1])


def tiling_of(
    counts: Sequence[int],
    lengths: Sequence[int],
    dim: int,
    long: bool,
) -> Tiling:
    """For rows of so many new tokens and keys. `long`: whether there is a kernel for many keys."""
    return LONG if long and have_many_keys(counts, lengths, dim) else SHORT


def have_many_keys(counts: Sequence[int], lengths: Sequence[int], dim: int) -> bool:
    """Whether rows of so many new tokens and keys are work for the kernel that is for many keys: on
    average over tokens, as if there were no windows."""
    keys = sum(n * length for n, length in zip(counts, lengths, strict=True))
    return keys >= (MANY_KEYS if dim <= WIDE else MANY_KEYS // 2) * sum(counts)
