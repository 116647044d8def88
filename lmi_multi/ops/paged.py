"""Reference attention over a paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from lmi_multi.engine.batch import Row
from lmi_multi.models.weights import Layer
from lmi_multi.ops import Attention
from lmi_multi.ops.heads import Heads

COPIED_BYTES = 64 << 20


@dataclass(frozen=True)
class Located:
    """Rows of `length` cached tokens: through a block table [rows, n], or, without one, in place
    at block `first`, `first + step`, and so on."""

    length: int
    rows: int
    table: Tensor | None = None
    first: int = 0
    step: int = 0


class PagedCache:
    """Keys and values of every sequence in blocks of `block_size` tokens.

    `k[layer]` and `v[layer]` are [blocks, block_size, kv_heads, head_dim] of the decoder's
    layers, or of the `layers` that a pipeline's stage has of them. Self- and
    cross-attention take blocks from the same pool. All layers are one tensor, `whole` [layers, 2,
    blocks, block_size, kv_heads, head_dim], so that clearing and copying blocks is one operation,
    however many layers there are.
    """

    def __init__(
        self,
        heads: Heads,
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        layers: int | None = None,
    ) -> None:
        self.heads, self.block_size = heads, block_size
        count = heads.spec.decoder_layers if layers is None else layers
        shape = (count, 2, blocks, block_size, heads.kv, heads.dim)
        self.whole = _unwritten(shape, dtype, device)
        self.k, self.v = list(self.whole[:, 0]), list(self.whole[:, 1])
        self._blocks = self.whole.flatten(3).flatten(0, 2)
        self._first = torch.arange(2 * count, device=device)[:, None] * blocks  # of every pool

    def slots(self, blocks: Sequence[int], start: int, stop: int) -> Tensor:
        """Where tokens start to stop of a sequence lie: int64, block * block_size + offset."""
        if stop == start + 1:  # a decode step's: small tensors would cost more than the answer
            return torch.tensor(
                [blocks[start // self.block_size] * self.block_size + start % self.block_size]
            )
        at = torch.arange(start, stop)
        return torch.tensor(blocks)[at // self.block_size] * self.block_size + at % self.block_size

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v [tokens, kv_heads, head_dim] at `slots` [tokens]."""
        self.k[layer].flatten(0, 1).index_copy_(0, slots, k)
        self.v[layer].flatten(0, 1).index_copy_(0, slots, v)

    def locate(self, blocks: Sequence[Sequence[int]], length: int) -> Located:
        """Where the first `length` tokens of every row lie, for `read`.

        Rows whose blocks follow each other, at even distances, are read in place; that is how
        fresh sequences lie. Others are gathered through a table, which is filled up with each
        row's first block: what is masked must at least be the row's own.
        """
        n = -(-length // self.block_size)
        first = blocks[0][0]
        step = blocks[1][0] - first if len(blocks) > 1 else n
        for i, row in enumerate(blocks):
            if step < n or list(row[:n]) != list(range(first + i * step, first + i * step + n)):
                table = [[*own[:n], *[own[0]] * (n - len(own))] for own in blocks]
                return Located(length, len(blocks), table=torch.tensor(table).to(self.k[0].device))
        return Located(length, len(blocks), first=first, step=step)

    def read(self, layer: int, where: Located) -> tuple[Tensor, Tensor]:
        """k and v [rows, length, kv_heads, head_dim] of the located rows; maybe views."""
        return self._read(self.k[layer], where), self._read(self.v[layer], where)

    def _read(self, pool: Tensor, where: Located) -> Tensor:
        tail = pool.shape[2:]
        if where.table is not None:
            rows = pool.index_select(0, where.table.flatten())
            return rows.view(where.rows, -1, *tail)[:, : where.length]
        block = pool.stride(0)
        size, stride = (where.rows, where.length, *tail), (where.step * block, *pool.stride()[1:])
        return pool.as_strided(size, stride, pool.storage_offset() + where.first * block)

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero `blocks` for a new owner. What lies beyond its tokens is masked, but a NaN that the
        last owner left there would come through as 0 * NaN."""
        self._blocks.index_fill_(0, self._everywhere(self._uploaded(blocks)), 0)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the first block of each pair to the second, which is no pair's first."""
        each = self._first.numel() * self._blocks[:1].nbytes
        some = max(COPIED_BYTES // max(each, 1), 1)  # what is copied is there twice meanwhile
        both = self._uploaded(pairs)
        for start in range(0, len(pairs), some):
            part = both[start : start + some].unbind(1)
            sources, targets = (self._everywhere(own) for own in part)
            self._blocks.index_copy_(0, targets, self._blocks.index_select(0, sources))

    def _everywhere(self, blocks: Tensor) -> Tensor:
        """Where these blocks are among those of all layers."""
        return (self._first + blocks).flatten()

    def _uploaded(self, numbers: Sequence[int] | Sequence[tuple[int, int]]) -> Tensor:
        """int64, where the cache is: in the order of a GPU's stream, without waiting for it."""
        host = torch.tensor(numbers, pin_memory=self._first.is_cuda)
        return host.to(self._first.device, non_blocking=True)


class PagedAttention(Attention):
    """One decoder step's attention: every row over its own cached tokens."""

    def __init__(self, cache: PagedCache, rows: Sequence[Row], device: torch.device) -> None:
        self.cache, self.heads, self.rows = cache, cache.heads, rows
        self.counts = [len(row.token_ids) for row in rows]
        # Leading rows of one token are attended together, as are neighbours that begin with equally
        # many tokens; the others one by one.
        self.singles = next((i for i, n in enumerate(self.counts) if n > 1), len(rows))
        self._longer = [
            list(group)
            for _, group in groupby(
                range(self.singles, len(rows)),
                lambda i: (-1 if rows[i].start else 0, i if rows[i].start else self.counts[i]),
            )
        ]
        positions = [p for row in rows for p in range(row.start, row.length)]
        self.positions = torch.tensor(positions, device=device)
        slots = [cache.slots(row.blocks, row.start, row.length) for row in rows]
        self._slots = torch.cat(slots).to(device)
        reach = torch.tensor([max(row.length, row.prompt_length) for row in rows])
        lengths = reach.repeat_interleave(torch.tensor(self.counts)).to(device)
        self._angles = self.heads.angles(self.positions, lengths)
        self._device = device
        single = rows[: self.singles]
        self._own = (
            cache.locate([r.blocks for r in single], max(r.length for r in single))
            if single
            else None
        )
        self._bias_of: dict[int, tuple[tuple[int, int], Tensor | None]] = {}
        self._cross: tuple[Located, Tensor | None] | None = None

    def attend(self, layer: Layer, qkv: Tensor) -> Tensor:
        """See `Attention.attend`; new keys and values are written in place."""
        q, k, v = self.heads.split(layer, qkv, self._angles)
        self.cache.write(layer.index, self._slots, k, v)
        out, first = [], self.singles
        if self._own is not None:
            keys, values = self.cache.read(layer.index, self._own)
            bias = self._bias(-1, layer, q.dtype)
            out.append(self.heads.attend(q[:first, None], keys, values, bias, layer.scale, False))
        for group in self._longer:
            size = len(group), self.counts[group[0]]
            part = slice(first, first := first + size[0] * size[1])
            own = (x[part].view(*size, *x.shape[1:]) for x in (q, k, v))
            out.append(self._attend_rows(group[0], layer, *own))
        return torch.cat(out) if len(out) > 1 else out[0]

    def cross_attend(self, layer: Layer, q: Tensor) -> Tensor:
        """See `Attention.cross_attend`."""
        where, bias = self._cross_rows(q.dtype)
        keys, values = self.cache.read(layer.index, where)
        q = q.view(-1, self.heads.q, self.heads.dim)
        if self.singles == len(self.rows):
            return self.heads.attend(q[:, None], keys, values, bias, layer.scale, False)
        parts = []
        for i, part in enumerate(q.split_with_sizes(self.counts)):
            own = slice(i, i + 1), slice(0, self.rows[i].cross_length)
            parts.append(
                self.heads.attend(part[None], keys[own], values[own], None, layer.scale, False)
            )
        return torch.cat(parts)

    def _attend_rows(self, i: int, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k and v [rows, tokens, heads, dim] of row `i` and of those that are like it."""
        row = self.rows[i]
        if row.start:
            where = self.cache.locate([row.blocks], row.length)
            k, v = self.cache.read(layer.index, where)
        elif layer.position_bias is None and not layer.window:
            return self.heads.attend(q, k, v, None, layer.scale, True)
        bias = self._bias(i, layer, q.dtype)
        return self.heads.attend(q, k, v, bias, layer.scale, False)

    def _bias(self, i: int, layer: Layer, dtype: torch.dtype) -> Tensor | None:
        """The bias of row `i`, or of all single rows for -1; kept for the layers that share it."""
        key = (id(layer.position_bias), layer.window)
        cached = self._bias_of.get(i)
        if cached is None or cached[0] != key:
            cached = self._bias_of[i] = (key, self._compute_bias(i, layer, dtype))
        return cached[1]

    def _compute_bias(self, i: int, layer: Layer, dtype: torch.dtype) -> Tensor | None:
        if i >= 0:
            row = self.rows[i]
            queries = torch.arange(row.start, row.length, device=self._device)
            keys = torch.arange(row.length, device=self._device)
            return self.heads.bias(layer, (keys - queries[:, None])[None], dtype, causal=True)
        lengths = {row.length for row in self.rows[: self.singles]}
        if layer.position_bias is None and not layer.window and len(lengths) == 1:
            return None
        keys = torch.arange(max(lengths), device=self._device)
        distance = keys - self.positions[: self.singles, None, None]
        return self.heads.bias(layer, distance, dtype, causal=True)

    def _cross_rows(self, dtype: torch.dtype) -> tuple[Located, Tensor | None]:
        """Where the encoded prompts lie, and what hides the ends of the shorter ones."""
        if self._cross is None:
            lengths = [row.cross_length for row in self.rows]
            where = self.cache.locate([row.cross_blocks for row in self.rows], max(lengths))
            bias = None
            if len(set(lengths)) > 1:
                beyond = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None, None, None]
                bias = torch.zeros(beyond.shape, dtype=dtype).masked_fill(beyond, -torch.inf)
                bias = bias.to(self._device)
            self._cross = (where, bias)
        return self._cross


def _unwritten(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A pool of which nobody has written anything: whoever gets a block zeroes it, or reads no more
    than was written.

    On a CPU zeros that take physical memory only once written, so that a large pool costs nothing:
    numpy allocates them with calloc, torch fills them. A GPU's memory as it was: to fill 56 GiB
    takes an H200 17 ms.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    bits = {2: np.int16, 4: np.int32}[dtype.itemsize]
    return torch.from_numpy(np.zeros(shape, dtype=bits)).view(dtype)
