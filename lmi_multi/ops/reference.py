"""The fused operations in plain torch: the definition of what every kernel must compute."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from lmi_multi.models.spec import Activation
from lmi_multi.models.weights import Linear, Norm
from lmi_multi.ops.heads import Heads


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}


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
        weight, bias, scale = linear.weight, linear.bias, linear.scale
        if scale is None:
            return self._matmul(x.to(weight.dtype), weight, bias)
        y = self._matmul(x, weight.to(x.dtype), None) * scale.to(x.dtype)
        return y if bias is None else y + bias

    def _matmul(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x @ weight.T + bias for operands of one float type."""
        return F.linear(x, weight, bias)
