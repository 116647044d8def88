"""Decode attention by compiled kernels: one new token a row over the paged cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmi_multi.engine.batch import Row
from lmi_multi.models.bias import relative_buckets
from lmi_multi.models.spec import RelativeBias
from lmi_multi.models.weights import Layer
from lmi_multi.ops.heads import Heads
from lmi_multi.ops.paged import PagedAttention, PagedCache

from .ops import Scratch

LEAST_SPLIT = 128  # tokens: with fewer a block costs more than it saves
MOST_SPLITS = 32


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
            self._by_distance[id(table)] = known  # holds the table, so that its id stays its own
        return known[1]


class CudaPagedAttention(PagedAttention):
    """`PagedAttention` whose single-token rows are attended by kernels, if all rows are such."""

    def __init__(
        self,
        cache: PagedCache,
        rows: Sequence[Row],
        device: torch.device,
        scratch: Scratch,
        biases: DistanceBias,
    ) -> None:
        super().__init__(cache, rows, device)
        self._scratch, self._biases = scratch, biases
        self._fused = self.singles == len(rows)
        if not self._fused:
            return
        size = cache.block_size
        self._lengths, self._table, self._splits = _located(
            self.heads, [row.blocks for row in rows], [row.length for row in rows], size, device
        )
        if rows[0].cross_length:
            self._cross_lengths, self._cross_table, self._cross_splits = _located(
                self.heads,
                [row.cross_blocks for row in rows],
                [row.cross_length for row in rows],
                size,
                device,
            )

    def attend(self, layer: Layer, qkv: Tensor) -> Tensor:
        """See `Attention.attend`."""
        if self._fused:
            where = self._lengths, self._table, self._splits
            out = self._run(layer, qkv, *where, write=True)
            if out is not None:
                return out
        return super().attend(layer, qkv)

    def cross_attend(self, layer: Layer, q: Tensor) -> Tensor:
        """See `Attention.cross_attend`."""
        if self._fused:
            where = self._cross_lengths, self._cross_table, self._cross_splits
            out = self._run(layer, q, *where, write=False)
            if out is not None:
                return out
        return super().cross_attend(layer, q)

    def _run(
        self, layer: Layer, q: Tensor, lengths: Tensor, table: Tensor, splits: int, write: bool
    ) -> Tensor | None:
        """Attend to, and with `write` first extend, what `table` locates; None if not covered."""
        heads = self.heads
        out = q.new_empty((len(self.rows), heads.q * heads.dim))
        cos, sin = self._angles if write and self._angles is not None else (None, None)
        bias = slopes = None
        if write and layer.position_bias is not None:
            position = heads.spec.position
            if isinstance(position, RelativeBias):
                bias = self._biases.of(layer.position_bias, position)
            else:
                slopes = layer.position_bias
        done = torch.ops.lmi_multi.attention(
            q,
            self.cache.k[layer.index],
            self.cache.v[layer.index],
            table,
            lengths,
            write,
            heads.q,
            layer.q_norm.weight if write and layer.q_norm else None,
            layer.k_norm.weight if write and layer.k_norm else None,
            heads.spec.norm_eps,
            cos,
            sin,
            bias,
            slopes,
            layer.window if write else 0,
            layer.scale,
            splits,
            self._scratch.work,
            self._scratch.counters,
            out,
        )
        return out if done else None


def _located(
    heads: Heads,
    blocks: Sequence[Sequence[int]],
    lengths: Sequence[int],
    block_size: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, int]:
    """Lengths [rows] and block table [rows, n], int32 on the device, and how many blocks of the
    kernel share a row's tokens."""
    width = -(-max(lengths) // block_size)
    table = [[*own[:width], *[0] * (width - len(own))] for own in blocks]
    busy = len(lengths) * heads.kv
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    splits = min(2 * processors // busy, max(lengths) // LEAST_SPLIT, MOST_SPLITS)
    return (
        torch.tensor(lengths, dtype=torch.int32).to(device),
        torch.tensor(table, dtype=torch.int32).to(device),
        max(splits, 1),
    )
