"""One rank's attention heads in plain torch: splitting, rotating, and the softmax itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmi_multi.models.bias import relative_buckets
from lmi_multi.models.rope import cos_sin, rotate
from lmi_multi.models.schema import Split
from lmi_multi.models.spec import Alibi, ModelSpec, RelativeBias, Rope
from lmi_multi.models.weights import Layer


class Heads:
    """One rank's heads: how packed qkv becomes normalized, rotated q, k and v."""

    def __init__(self, spec: ModelSpec, ranks: int) -> None:
        self.spec = spec
        self.dim = spec.head_dim
        self.q = Split(0, (spec.heads,)).size(ranks)
        self.kv = Split(0, (spec.kv_heads,)).size(ranks)

    def split(
        self, layer: Layer, qkv: Tensor, angles: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [tokens, (q + 2 kv) * dim] -> q [tokens, q, dim], k and v [tokens, kv, dim]."""
        heads = qkv.view(-1, self.q + 2 * self.kv, self.dim)
        q, k, v = heads.split_with_sizes((self.q, self.kv, self.kv), dim=1)
        eps = self.spec.norm_eps
        if layer.q_norm is not None:
            q = F.rms_norm(q, (self.dim,), layer.q_norm.weight, eps)
        if layer.k_norm is not None:
            k = F.rms_norm(k, (self.dim,), layer.k_norm.weight, eps)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        return q, k, v

    def angles(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rotary cosines and sines of the step's tokens; None without rotary positions."""
        rope = self.spec.position
        return cos_sin(rope, positions, lengths) if isinstance(rope, Rope) else None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool
    ) -> Tensor:
        """softmax(q k^T * scale + bias) v.

        q [rows, queries, heads, dim], k and v [rows, keys, kv, dim], bias broadcastable to
        [rows, heads, queries, keys]; returns [rows * queries, heads * dim].
        """
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with _cudnn_left_out() if q.is_cuda else nullcontext():
            out = F.scaled_dot_product_attention(
                q, k, v, bias, is_causal=causal, scale=scale, enable_gqa=self.q != self.kv
            )
        return out.transpose(1, 2).reshape(-1, self.q * self.dim)

    def bias(
        self, layer: Layer, distance: Tensor, dtype: torch.dtype, causal: bool
    ) -> Tensor | None:
        """What is added to the scores at each `key - query` distance [rows, queries, keys].

        [rows, heads or 1, queries, keys] in `dtype`, -inf where a key must not be seen; None if
        nothing is added or hidden.
        """
        total = self.position_bias(layer, distance, causal)
        if not causal:
            # Contiguous: torch's fast kernels take no other.
            return None if total is None else total.to(dtype).contiguous()
        hidden = distance > 0
        if layer.window:
            hidden |= distance <= -layer.window
        if total is None:
            total = torch.zeros((), device=distance.device)
        return torch.where(hidden[:, None], -torch.inf, total).to(dtype).contiguous()

    def position_bias(self, layer: Layer, distance: Tensor, causal: bool) -> Tensor | None:
        """What positions add at `key - query` distances [rows, queries, keys]: float32
        [rows, heads, queries, keys], or None. Nothing is hidden by it."""
        position, table = self.spec.position, layer.position_bias
        if table is None:
            return None
        if isinstance(position, Alibi):
            return table[:, None, None] * distance[:, None]
        if not isinstance(position, RelativeBias):
            raise TypeError(f"{type(position).__name__} has no bias table")
        buckets = relative_buckets(distance, position, bidirectional=not causal)
        return table.float()[buckets].permute(0, 3, 1, 2)


@contextmanager
def _cudnn_left_out() -> Iterator[None]:
    """torch's attention without cuDNN, which it prefers on Hopper for half types: cuDNN makes a
    graph for every new pair of lengths, which takes far longer than attention does, and lengths
    are of all kinds.

    The setting is the process's. Where cuDNN's is the only one allowed, as somebody else's choice
    in another thread may be, nothing is changed. A choice that begins meanwhile and ends later
    finds cuDNN left out, and leaves it so; one that ends earlier only lets us wait for a graph.
    """
    asked: Any = torch.backends.cuda
    others = (asked.flash_sdp_enabled, asked.mem_efficient_sdp_enabled, asked.math_sdp_enabled)
    if not (asked.cudnn_sdp_enabled() and any(enabled() for enabled in others)):
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
