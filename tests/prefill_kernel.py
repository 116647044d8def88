"""What the prefill kernels compute, in plain torch: the same operands, tile by tile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmi_multi.models.rope import rotate


def lay_out(
    starts: Tensor, lengths: Tensor, reached: Tensor, table: Tensor, block_size: int,
    positions: Tensor, reach: Tensor, slots: Tensor,
) -> bool:  # fmt: skip
    """The operation of csrc/library_prefill.cu."""
    positions.zero_(), reach.zero_(), slots.fill_(-1)
    for row, (first, end) in enumerate(zip(starts.tolist(), starts.tolist()[1:], strict=False)):
        for token in range(first, end):
            place = int(lengths[row]) - (end - token)
            positions[token], reach[token] = place, reached[row]
            block = place // block_size
            if block < table.shape[1] and table[row, block] >= 0:
                slots[token] = table[row, block] * block_size + place % block_size
    return True


def write_kv(kv: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> bool:
    """Store packed keys and values [tokens, 2 * kv_heads * dim] where `slots` is not negative."""
    stored = slots >= 0
    new = kv.view(len(slots), 2, *k.shape[2:])[stored]
    k.flatten(0, 1)[slots[stored].long()] = new[:, 0]
    v.flatten(0, 1)[slots[stored].long()] = new[:, 1]
    return True


def prefill(
    q: Tensor, k: Tensor | None, v: Tensor | None, slots: Tensor | None, table: Tensor | None,
    starts: Tensor, lengths: Tensor, tiles: Tensor, queries: int, many: bool, heads: int,
    kv_heads: int,
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float, cos: Tensor | None,
    sin: Tensor | None, bias: Tensor | None, slopes: Tensor | None, causal: bool, window: int,
    scale: float, out: Tensor,
) -> bool:  # fmt: skip
    """The operation of csrc/library_prefill.cu, but that it does not leave q and k turned."""
    tokens, dim = len(out), out.shape[1] // heads
    turned = q.view(tokens, -1, dim)[:, :heads]
    if q_norm is not None:
        turned = F.rms_norm(turned, (dim,), q_norm.to(q.dtype), eps)
    keys, values = k, v
    if k is None or slots is not None:
        new_k, new_v = q.view(tokens, -1, dim)[:, heads:].chunk(2, 1)
        if k_norm is not None:
            new_k = F.rms_norm(new_k, (dim,), k_norm.to(q.dtype), eps)
        if cos is not None and sin is not None:
            turned, new_k = rotate(turned, cos, sin), rotate(new_k, cos, sin)
        if k is None or v is None or slots is None:
            keys, values = new_k, new_v
        else:
            write_kv(torch.cat((new_k, new_v), 1), k, v, slots)
    assert keys is not None and values is not None
    out.fill_(torch.nan)
    for row, first in tiles.tolist():
        if row < 0:
            continue
        begin, end, length = int(starts[row]), int(starts[row + 1]), int(lengths[row])
        tile = slice(begin + first, min(begin + first + queries, end))
        if table is None:
            own_k, own_v = keys[begin : begin + length], values[begin : begin + length]
        else:
            blocks = table[row, : -(-length // keys.shape[1])].long()
            own_k, own_v = (x[blocks].flatten(0, 1)[:length] for x in (keys, values))
        past = length - (end - begin) if causal else 0
        position = past + torch.arange(tile.start - begin, tile.stop - begin)
        distance = position[:, None] - torch.arange(length)
        own_k, own_v = (x.float().repeat_interleave(heads // kv_heads, 1) for x in (own_k, own_v))
        scores = torch.einsum("qhd,khd->hqk", turned[tile].float(), own_k) * scale
        if bias is not None:
            at = distance + (0 if causal else (bias.shape[1] - 1) // 2)
            scores = scores + bias[:, at.clamp(0, bias.shape[1] - 1)]
        if slopes is not None:
            scores = scores - slopes[:, None, None] * distance
        if causal:
            scores = scores.masked_fill(distance < 0, -torch.inf)
        if window:
            scores = scores.masked_fill(distance >= window, -torch.inf)
        out[tile] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), own_v).flatten(1).to(out.dtype)
    return True
