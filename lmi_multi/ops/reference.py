"""The fused operations in plain torch: the definition of what every kernel must compute."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lmi_multi.models.spec import Activation
from lmi_multi.models.weights import LARGEST, Linear, Norm
from lmi_multi.ops.heads import Heads


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}


def unit_of(codes: torch.dtype, dtype: torch.dtype) -> float:
    """What a quantized weight's codes are divided by in `dtype`, and its scale grows by.

    In fp16 a power of two that brings codes below one: sums of codes up to 448 would leave the
    type's range, and scales as small as theirs its precision.
    """
    return 2.0 ** math.frexp(LARGEST[codes])[1] if dtype == torch.float16 else 1.0


class Reference:
    """`lmi_multi.ops.Ops` in plain torch, for any device."""

    heads: type[Heads] = Heads

    def norm(self, x: Tensor, norm: Norm, eps: float) -> Tensor:
        """See `Ops.norm`."""
        weight, bias = norm.weight, norm.bias
        if x.dtype != weight.dtype:  # a float32 residual stream over half-precision weights
            wide = None if bias is None else bias.float()
            return self.norm(x, Norm(weight.float(), wide), eps).to(weight.dtype)
        if bias is None:
            return F.rms_norm(x, weight.shape, weight, eps)
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def linear(
        self, x: Tensor, linear: Linear, activation: Activation | None = None, gated: bool = False
    ) -> Tensor:
        """See `Ops.linear`."""
        y = self._product(x, linear)
        return y if activation is None else self.activate(y, activation, gated)

    def activate(self, y: Tensor, activation: Activation, gated: bool = False) -> Tensor:
        """activation(y), or, of halves [gate, up] where `gated`, activation(gate) * up."""
        if not gated:
            return ACTIVATIONS[activation](y)
        gate, up = y.chunk(2, dim=-1)
        return ACTIVATIONS[activation](gate) * up

    def norm_linear(
        self,
        x: Tensor,
        norm: Norm,
        eps: float,
        linear: Linear,
        activation: Activation | None = None,
        gated: bool = False,
    ) -> Tensor:
        """See `Ops.norm_linear`."""
        return self.linear(self.norm(x, norm, eps), linear, activation, gated)

    def linear_residual(self, x: Tensor, linear: Linear, residual: Tensor) -> Tensor:
        """See `Ops.linear_residual`."""
        return residual + self._product(x, linear)

    def _product(self, x: Tensor, linear: Linear) -> Tensor:
        weight, bias = linear.weight, linear.bias
        if linear.scale is None:
            return self._matmul(x.to(weight.dtype), weight, bias)
        codes, scale = self._widened(weight, linear.scale, x.dtype)
        y = self._matmul(x, codes, None) * scale
        return y if bias is None else y + bias

    def _widened(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A quantized weight's codes and scale in `dtype`, such that (x @ codes.T) * scale is exact
        but for the product's own rounding."""
        wide, unit = codes.to(dtype), unit_of(codes.dtype, dtype)
        if unit == 1:
            return wide, scale.to(dtype)
        return wide.mul_(1 / unit), (scale * unit).to(dtype)

    def _matmul(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x @ weight.T + bias for operands of one float type."""
        return F.linear(x, weight, bias)
