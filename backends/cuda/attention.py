"""Decode attention by compiled kernels: one new token a row over the paged cache."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmi_multi.engine.batch import Row
from lmi_multi.models.bias import relative_buckets
from lmi_multi.models.spec import RelativeBias
from lmi_multi.models.weights import Layer, Linear, Norm
from lmi_multi.ops.heads import Heads
from lmi_multi.ops.paged import PagedAttention, PagedCache

from .ops import Scratch, processors

MOST_SPLITS = 32


@dataclass(frozen=True)
class Where:
    """Rows in the cache: how many tokens each has, int32 [rows], and which blocks, int32
    [rows, n]. Up to `splits` blocks of the kernel share a row's tokens."""

    lengths: Tensor
    table: Tensor
    splits: int


@dataclass(frozen=True)
class Projection:
    """Queries, and keys and values, that are still to be made: `linear` of x [rows, inputs], which
    is normalized first if there is a norm."""

    x: Tensor
    linear: Linear
    norm: Norm | None
    eps: float

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As `lmi_multi::heads` wants them."""
        norm = (None, None) if self.norm is None else (self.norm.weight, self.norm.bias)
        return self.x, self.linear.weight, self.linear.bias, *norm, self.eps


class DistanceBias:
    """A relative-bias table by distance instead of by bucket, kept for the steps to come."""

    def __init__(self) -> None:
        self._by_distance: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, table: Tensor, position: RelativeBias) -> Tensor:
        """float32 [max_distance + 1, heads]; all larger distances have the last one's bias."""
        known = self._by_distance.get(id(table))
        if known is None:
            distance = -torch.arange(position.max_distance + 1, device=table.device)
            buckets = relative_buckets(distance, position, bidirectional=False)
            known = (table, table.float()[buckets].contiguous())
            if table.is_cuda and not torch.cuda.is_current_stream_capturing():
                # Kernels read it before they wait for the ones in front of them.
                torch.cuda.current_stream(table.device).synchronize()
            self._by_distance[id(table)] = known  # holds the table, so that its id stays its own
        return known[1]


class DecodeAttention:
    """The attention kernel over one cache; and, for few rows of a small network, the kernel that
    makes what it attends with in the same go."""

    def __init__(self, cache: PagedCache, scratch: Scratch) -> None:
        self.cache, self.heads, self._scratch = cache, cache.heads, scratch
        self._kernels: Any = torch.ops.lmi_multi
        self._biases = DistanceBias()

    def with_kernels(self, kernels: Any) -> DecodeAttention:
        """The same over the same cache, by other kernels."""
        other = copy(self)
        other._kernels = kernels
        return other

    def extend(
        self,
        layer: Layer,
        qkv: Tensor | Projection,
        where: Where,
        angles: tuple[Tensor, Tensor] | None,
    ) -> Tensor | None:
        """Write the rows' new keys and values, then attend to all. None if it is not covered."""
        cos, sin = (None, None) if angles is None else angles
        bias = slopes = None
        if layer.position_bias is not None:
            position = self.heads.spec.position
            if isinstance(position, RelativeBias):
                bias = self._biases.of(layer.position_bias, position)
            else:
                slopes = layer.position_bias
        q_norm = layer.q_norm.weight if layer.q_norm else None
        k_norm = layer.k_norm.weight if layer.k_norm else None
        return self._run(layer, qkv, where, True, q_norm, k_norm, cos, sin, bias, slopes)

    def read(self, layer: Layer, q: Tensor | Projection, where: Where) -> Tensor | None:
        """Attend to what is there: a prompt's keys and values. None if it is not covered."""
        return self._run(layer, q, where, False)

    def _run(
        self,
        layer: Layer,
        q: Tensor | Projection,
        where: Where,
        write: bool,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        bias: Tensor | None = None,
        slopes: Tensor | None = None,
    ) -> Tensor | None:
        heads = self.heads
        out = self.cache.k[layer.index].new_empty((len(where.lengths), heads.q * heads.dim))
        given, kernel = (q,), self._kernels.attention
        if isinstance(q, Projection):
            if q.linear.scale is not None:
                return None
            given, kernel = q.arguments, self._kernels.heads
        done = kernel(
            *given,
            self.cache.k[layer.index],
            self.cache.v[layer.index],
            where.table,
            where.lengths,
            write,
            heads.q,
            q_norm,
            k_norm,
            heads.spec.norm_eps,
            cos,
            sin,
            bias,
            slopes,
            layer.window if write else 0,
            layer.scale,
            where.splits,
            self._scratch.work,
            self._scratch.counters,
            out,
        )
        return out if done else None


class CudaPagedAttention(PagedAttention):
    """`PagedAttention` whose single-token rows are attended by kernels, if all rows are such."""

    def __init__(
        self,
        cache: PagedCache,
        rows: Sequence[Row],
        device: torch.device,
        kernel: DecodeAttention,
    ) -> None:
        super().__init__(cache, rows, device)
        self._kernel = kernel
        self._fused = self.singles == len(rows)
        if not self._fused:
            return
        size = cache.block_size
        lengths = [row.length for row in rows]
        self._where = _located(self.heads, [row.blocks for row in rows], lengths, size, device)
        if rows[0].cross_length:
            blocks, lengths = [r.cross_blocks for r in rows], [r.cross_length for r in rows]
            self._cross_where = _located(self.heads, blocks, lengths, size, device)

    def attend(self, layer: Layer, qkv: Tensor) -> Tensor:
        """See `Attention.attend`."""
        if self._fused:
            out = self._kernel.extend(layer, qkv, self._where, self._angles)
            if out is not None:
                return out
        return super().attend(layer, qkv)

    def cross_attend(self, layer: Layer, q: Tensor) -> Tensor:
        """See `Attention.cross_attend`."""
        if self._fused:
            out = self._kernel.read(layer, q, self._cross_where)
            if out is not None:
                return out
        return super().cross_attend(layer, q)


def splits(heads: Heads, rows: int, device: torch.device, blocks: int = 2) -> int:
    """Into how many parts a row's tokens may be split: enough for so many blocks a processor."""
    return max(min(blocks * processors(device) // (rows * heads.kv), MOST_SPLITS), 1)


def _located(
    heads: Heads,
    blocks: Sequence[Sequence[int]],
    lengths: Sequence[int],
    block_size: int,
    device: torch.device,
) -> Where:
    width = -(-max(lengths) // block_size)
    table = [[*own[:width], *[0] * (width - len(own))] for own in blocks]
    return Where(
        torch.tensor(lengths, dtype=torch.int32).to(device),
        torch.tensor(table, dtype=torch.int32).to(device),
        splits(heads, len(lengths), device),
    )
