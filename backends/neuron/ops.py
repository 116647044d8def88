"""The fused operations as a compiler for NeuronCores wants to see them: plain products and sums."""

from __future__ import annotations

import torch
from torch import Tensor

from lmi_multi.models.weights import Norm
from lmi_multi.ops.reference import Reference


class NeuronOps(Reference):
    """`lmi_multi.ops.Ops` for tracing. What differs is what torch's own lowering would make of
    an operation."""

    def norm(self, x: Tensor, norm: Norm, eps: float) -> Tensor:
        """See `Ops.norm`. torch's layer_norm lowers to a training batch norm, this to sums."""
        wide = x.float()
        if norm.bias is not None:
            wide = wide - wide.mean(-1, keepdim=True)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        out = wide * scale * norm.weight.float()
        if norm.bias is not None:
            out = out + norm.bias.float()
        return out.to(norm.weight.dtype)


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest id int64 [rows] of the largest of `logits` [rows, vocab], and that logit [rows].

    torch's argmax lowers to a reduce over pairs, which the hardware's compiler refuses.
    """
    # Of 32 bits: the least of int64 is looked for from its maximum, which the hardware has not.
    ids = torch.arange(logits.shape[-1], device=logits.device).int()
    best = logits.amax(-1, keepdim=True)
    # Where a logit is NaN nothing equals the largest, which is NaN too.
    return torch.where(logits == best, ids, ids[-1]).amin(-1).long(), best[:, 0]
