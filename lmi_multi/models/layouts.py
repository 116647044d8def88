"""Pure fix-ups of weights: every kernel sees [out, in], [q; k; v] and half-split rotary."""

from __future__ import annotations

from torch import Tensor, cat

from lmi_multi.models.spec import ModelSpec, Rope


def transpose(w: Tensor, spec: ModelSpec) -> Tensor:
    """GPT-2's Conv1D stores [in, out]; biases pass through."""
    return w.t() if w.dim() == 2 else w


def split_heads_qkv(w: Tensor, spec: ModelSpec) -> Tensor:
    """[heads, 3, head_dim, ...] -> [3, heads, head_dim, ...] (BLOOM, GPT-NeoX)."""
    tail = w.shape[1:]
    return w.reshape(spec.heads, 3, spec.head_dim, *tail).transpose(0, 1).reshape(-1, *tail)


def half_split_rope(w: Tensor, spec: ModelSpec) -> Tensor:
    """Reorder the interleaved rotary pairs of q and k into halves (GPT-J); w is [q; k; v]."""
    if not isinstance(spec.position, Rope):
        raise TypeError("half_split_rope needs a Rope position")
    d, tail = spec.position.dim, w.shape[1:]
    heads = w.reshape(3, spec.heads, spec.head_dim, *tail)
    rotary, rest = heads[:2, :, :d], heads[:2, :, d:]
    qk = cat((rotary[:, :, 0::2], rotary[:, :, 1::2], rest), dim=2)
    return cat((qk, heads[2:]), dim=0).reshape(-1, *tail)


def drop_two_rows(w: Tensor, spec: ModelSpec) -> Tensor:
    """OPT numbers its positions from 2."""
    return w[2:]
