"""What a captured step reads: tensors that stay where they are, filled from the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmi_multi.backends.base import Limits
from lmi_multi.engine.batch import Row

from .attention import Where


class StepInputs:
    """Up to `most` rows of one token each.

    `ids` int64 [most] are the tokens, `lengths` int32 [most] the context with them, and `live`
    int32 [most] by how much that grows with each step: 0 for places that no row has. Such a place
    computes too, on block `spare`, which belongs to nobody.

    A step that draws by a kernel leaves its tokens in one half of `tokens`, int64 [2, most] in
    pinned memory: a row's in that which `turns` int32 [most] says, and it then turns to the other.
    `turn` is what `fill` has them begin with. `fills` counts how often anything was filled in.
    """

    def __init__(self, limits: Limits, most: int, encoded: bool, device: torch.device) -> None:
        self.most, self.spare, self.block_size = most, limits.blocks, limits.block_size
        self.fills = 0
        width = -(-limits.max_tokens // limits.block_size)
        widths = [1, 1, 1, 1, width, width if encoded else 0]
        sizes = [most * n for n in widths]
        self._host = np.zeros(sum(sizes), dtype=np.int32)
        self._packed = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        ends = np.cumsum(sizes)[:-1]
        shapes = [*[(most,)] * 4, (most, widths[4]), (most, widths[5])]
        host = [part.reshape(s) for part, s in zip(np.split(self._host, ends), shapes, strict=True)]
        self._lengths, self._live, self._turns, self._cross_lengths = host[:4]
        self._table, self._cross_table = host[4:]
        parts = self._packed.split_with_sizes(sizes)
        views = [part.view(s) for part, s in zip(parts, shapes, strict=True)]
        self.lengths, self.live, self.turns, self.cross_lengths = views[:4]
        self.table, self.cross_table = views[4:]
        self.ids = torch.zeros(most, dtype=torch.int64, device=device)
        self.tokens, self.turn = pinned((2, most), torch.int64), 0
        self.clear()

    def clear(self) -> None:
        """No rows at all."""
        self.fill(())

    def fill(self, rows: Sequence[Row], ahead: int = 0) -> None:
        """The rows, each `ahead` tokens further than it says, in the first places."""
        self.fills += 1
        self._live[:] = 0
        self._turns[:] = self.turn
        self._lengths[:] = 1
        self._cross_lengths[:] = 0
        self._table[:] = self.spare
        self._cross_table[:] = self.spare
        self._live[: len(rows)] = 1
        self._lengths[: len(rows)] = [row.length + ahead for row in rows]
        self._cross_lengths[: len(rows)] = [row.cross_length for row in rows]
        for i, row in enumerate(rows):
            self._table[i, : len(row.blocks)] = row.blocks
            self._cross_table[i, : len(row.cross_blocks)] = row.cross_blocks
        upload(self._host, self._packed)

    def feed(self, rows: Sequence[Row]) -> None:
        """The rows' tokens, one each, in the first places."""
        ids = np.array([row.token_ids[0] for row in rows], dtype=np.int64)
        upload(ids, self.ids[: len(rows)])

    def drop(self, first: int, stop: int) -> None:
        """Let no row have these places any more, whatever the device has made of the others."""
        self.live[first:stop] = 0
        self.lengths[first:stop] = 1
        self.table[first:stop] = self.spare

    def where(self, rows: int, splits: int) -> Where:
        """The first `rows` rows' own tokens."""
        return Where(self.lengths[:rows], self.table[:rows], splits)

    def cross_where(self, rows: int, splits: int) -> Where:
        """Their encoded prompts."""
        return Where(self.cross_lengths[:rows], self.cross_table[:rows], splits)


def upload(values: npt.NDArray[Any], to: Tensor) -> None:
    """Copy to the device in the stream's order, without waiting: `values` may change at once."""
    to.copy_(torch.from_numpy(values).pin_memory(), non_blocking=True)


def download(values: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A copy in host memory, and what tells when it is there; neither waits."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    return host, recorded()


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Host memory that the device can reach: zeros."""
    return torch.zeros(shape, dtype=dtype, pin_memory=True)


def recorded() -> torch.cuda.Event:
    """What tells when the current stream has come to where it is now."""
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()
    return done
