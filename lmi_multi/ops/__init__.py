"""The fused operations that the network is written in.

A backend hands the network an object with these methods; `reference` is plain torch, which the
CPU runs and every kernel is compared with. Operations have the granularity that a kernel wants,
so nothing has to be pattern-matched. Activations are packed: [tokens, features], no padding.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lmi_multi.models.spec import Activation
from lmi_multi.models.weights import Layer, Linear, Norm


class Ops(Protocol):
    """Operations on packed activations x [tokens, features]."""

    def norm(self, x: Tensor, norm: Norm, eps: float) -> Tensor:
        """LayerNorm or RMSNorm (no bias), statistics in float32, result in the norm's dtype."""

    def linear(
        self, x: Tensor, linear: Linear, activation: Activation | None = None, gated: bool = False
    ) -> Tensor:
        """x @ weight.T (* scale) + bias, then the activation.

        `gated`: the output's halves are [gate, up] and the result is activation(gate) * up.
        """

    def norm_linear(
        self,
        x: Tensor,
        norm: Norm,
        eps: float,
        linear: Linear,
        activation: Activation | None = None,
        gated: bool = False,
    ) -> Tensor:
        """`linear` of `norm` of x."""

    def linear_residual(self, x: Tensor, linear: Linear, residual: Tensor) -> Tensor:
        """residual + linear(x), in the residual's dtype, maybe in the residual's place."""


class Attention(Protocol):
    """The attention of one step, bound to what that step attends to.

    The network calls it once a layer; how keys and values are stored (paged blocks, fixed slots
    of a static graph, none at all in an encoder) is its own business. Implementations derive from
    this class, for what the network calls are the methods that project.
    """

    def project_and_attend(
        self, layer: Layer, x: Tensor, norm: Norm | None, eps: float, ops: Ops
    ) -> Tensor:
        """`attend` with the layer's product of x, which is normalized first if there is a norm.

        For an attention to override that has all of it in one operation.
        """
        if norm is None:
            return self.attend(layer, ops.linear(x, layer.qkv))
        return self.attend(layer, ops.norm_linear(x, norm, eps, layer.qkv))

    def project_and_cross_attend(
        self, layer: Layer, x: Tensor, norm: Norm, linear: Linear, eps: float, ops: Ops
    ) -> Tensor:
        """`cross_attend` with the layer's product of x normalized, likewise."""
        return self.cross_attend(layer, ops.norm_linear(x, norm, eps, linear))

    def attend(self, layer: Layer, qkv: Tensor) -> Tensor:
        """Self-attention of packed qkv [tokens, (heads + 2 kv_heads) * head_dim].

        Splits, normalizes and rotates q and k, stores k and v, and returns the weighted values
        [tokens, heads * head_dim].
        """

    def cross_attend(self, layer: Layer, q: Tensor) -> Tensor:
        """Attention of q [tokens, heads * head_dim] over each row's encoded prompt."""
