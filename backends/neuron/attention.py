"""Attention of static graphs: over a block table into pooled keys and values, or over the prompt.

Shapes never depend on data: what a row does not have is masked. A masked key or value is zeroed
before its product, so that stale cache, which may hold a NaN, changes nothing; blocks therefore
need no clearing when they get a new owner.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lmi_multi.models.weights import Layer
from lmi_multi.ops import Attention
from lmi_multi.ops.heads import Heads

MASKED = -1e30  # finite: a row of which every key is masked must not become NaN


class State(Protocol):
    """The pooled keys and values, [slots, kv_heads, head_dim] a decoder layer."""

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v [tokens, kv_heads, head_dim] at `slots` int64 [tokens]."""

    def read(self, layer: int, table: Tensor) -> tuple[Tensor, Tensor]:
        """k and v [rows, blocks * block_size, kv_heads, head_dim] by block table [rows, blocks]."""


def weigh(
    heads: Heads, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, hidden: Tensor, scale: float
) -> Tensor:
    """softmax(q k^T * scale + bias) v over the keys that are not `hidden`.

    q [rows, queries, heads, dim], k and v [rows, keys, kv, dim], bias [rows or 1, heads or 1,
    queries, keys] or None, hidden bool [rows, queries, keys]; returns [rows * queries,
    heads * dim]. The softmax is float32.
    """
    rows, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    group = heads.q // heads.kv
    never = hidden.all(1)[:, :, None, None]
    zero = torch.zeros((), dtype=k.dtype, device=k.device)
    k, v = torch.where(never, zero, k), torch.where(never, zero, v)
    # Query heads of one kv head lie beside each other: they become further queries of it.
    q = q.view(rows, queries, heads.kv, group, heads.dim).permute(0, 2, 3, 1, 4)
    q = q.reshape(rows, heads.kv, group * queries, heads.dim)
    scores = torch.matmul(q, k.permute(0, 2, 3, 1)).float() * scale
    scores = scores.view(rows, heads.q, queries, keys)
    if bias is not None:
        scores = scores + bias
    scores = torch.where(hidden[:, None], MASKED, scores)
    weights = scores.softmax(-1).to(v.dtype).view(rows, heads.kv, group * queries, keys)
    out = torch.matmul(weights, v.permute(0, 2, 1, 3))
    out = out.view(rows, heads.kv, group, queries, heads.dim).permute(0, 3, 1, 2, 4)
    return out.reshape(rows * queries, heads.q * heads.dim)


class TableAttention(Attention):
    """A decoder's step: every row over its own tokens, which its block table finds.

    `positions` int64 [rows * queries] and `slots`, where their keys and values go, of the same
    shape; `table` int64 [rows, blocks]; `cross_table` int64 [rows, blocks] and `cross_lengths`
    int64 [rows] locate the encoded prompts. Padding tokens point at a block that nobody owns.
    """

    def __init__(
        self,
        heads: Heads,
        state: State,
        positions: Tensor,
        slots: Tensor,
        table: Tensor,
        block_size: int,
        cross_table: Tensor | None = None,
        cross_lengths: Tensor | None = None,
    ) -> None:
        self._heads, self._state, self._slots, self._table = heads, state, slots, table
        self._cross_table, self._cross_lengths = cross_table, cross_lengths
        self._rows = table.shape[0]
        self._angles = heads.angles(positions, positions)
        keys = torch.arange(table.shape[1] * block_size, device=table.device)
        self._distance = keys - positions.view(self._rows, -1, 1)

    def attend(self, layer: Layer, qkv: Tensor) -> Tensor:
        """See `Attention.attend`."""
        q, k, v = self._heads.split(layer, qkv, self._angles)
        self._state.write(layer.index, self._slots, k, v)
        keys, values = self._state.read(layer.index, self._table)
        hidden = self._distance > 0
        if layer.window:
            hidden = hidden | (self._distance <= -layer.window)
        bias = self._heads.position_bias(layer, self._distance, causal=True)
        q = q.view(self._rows, -1, *q.shape[1:])
        return weigh(self._heads, q, keys, values, bias, hidden, layer.scale)

    def cross_attend(self, layer: Layer, q: Tensor) -> Tensor:
        """See `Attention.cross_attend`. Raises TypeError without a cross table."""
        if self._cross_table is None or self._cross_lengths is None:
            raise TypeError("this graph has no encoded prompts")
        keys, values = self._state.read(layer.index, self._cross_table)
        q = q.view(self._rows, -1, self._heads.q, self._heads.dim)
        at = torch.arange(keys.shape[1], device=q.device)
        hidden = (at >= self._cross_lengths[:, None])[:, None].expand(-1, q.shape[1], -1)
        return weigh(self._heads, q, keys, values, None, hidden, layer.scale)


class PromptAttention(Attention):
    """An encoder's prompts [rows, tokens], of which the first `lengths` int64 [rows] are real."""

    def __init__(self, heads: Heads, positions: Tensor, lengths: Tensor) -> None:
        self._heads, self._rows = heads, lengths.shape[0]
        self._angles = heads.angles(positions, positions)
        count = positions.shape[0] // self._rows
        at = torch.arange(count, device=positions.device)
        self._distance = (at[None] - at[:, None])[None]
        self._hidden = (at >= lengths[:, None])[:, None].expand(-1, count, -1)

    def attend(self, layer: Layer, qkv: Tensor) -> Tensor:
        """See `Attention.attend`; nothing is stored."""
        parts = self._heads.split(layer, qkv, self._angles)
        q, k, v = (x.view(self._rows, -1, *x.shape[1:]) for x in parts)
        bias = self._heads.position_bias(layer, self._distance, causal=False)
        return weigh(self._heads, q, k, v, bias, self._hidden, layer.scale)

    def cross_attend(self, layer: Layer, q: Tensor) -> Tensor:
        """Raises TypeError: an encoder has no cross-attention."""
        raise TypeError("an encoder has no cross-attention")
