"""The fused operations by compiled kernels for few rows; by torch for many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lmi_multi.models.spec import Activation
from lmi_multi.models.weights import Linear, Norm
from lmi_multi.ops.reference import Reference, unit_of

# Rows up to which a kernel is offered the work, by the type of the weights; above, cuBLAS is the
# faster one (benchmarks/results/cuda-kernels.md), or a kernel does not go that far.
MOST_ROWS: Mapping[torch.dtype, int] = {
    torch.float32: 8,
    torch.float16: 8,
    torch.bfloat16: 8,
    torch.int8: 32,
    torch.float8_e4m3fn: 32,
}
ACTIVATIONS: dict[Activation | None, int] = {
    None: 0,
    "gelu": 1,
    "gelu_tanh": 2,
    "relu": 3,
    "silu": 4,
}
# Rows of x from which on a kernel for Hopper's tensor cores is the faster one, and up to which: of
# quantized weights; and of half types, which cuBLAS knows too, of small ones. There it is starting
# and ending that takes time, which ours does while others are at work.
GEMM_ROWS, MOST_GEMM_ROWS = 9, 64
MOST_SMALL_ROWS, SMALL = 32, 8 << 20  # bytes
# Rows, features and share of the GPU's blocks from which on that kernel's form for many rows is
# faster than cuBLAS' product and a kernel for the activation behind it. With fewer features
# finishing a tile takes longer than multiplying the next, which hides it; and a last round of few
# tiles is waste.
LARGE_ROWS, LARGE_FEATURES, LARGE_SHARE = 1024, 2048, 0.9
LARGE_TILE = 256  # rows of x that two blocks have, and of the weights
# Activations that cuBLASLt has as epilogues behind a bias; its gelu is the tanh form.
EPILOGUES = ("gelu_tanh", "relu")


class Scratch:
    """Memory that kernels leave as they found it (counters: zero), for one stream at a time."""

    def __init__(self, device: torch.device, counters: int = 0) -> None:
        """`counters`: at least so many; attention wants one for each head of each row."""
        self.work = torch.empty(8 << 20, dtype=torch.float32, device=device)
        self.counters = torch.zeros(max(counters, 1 << 16), dtype=torch.int32, device=device)
        self.barrier = torch.zeros(1, dtype=torch.int32, device=device)


class CudaOps(Reference):
    """`lmi_multi.ops.Ops` by the kernels. What one does not cover, it leaves to `Reference`.

    `kernels`: the compiled ones, or what takes their place.
    """

    def __init__(
        self,
        scratch: Scratch,
        most_rows: Mapping[torch.dtype, int] = MOST_ROWS,
        kernels: Any = None,
    ) -> None:
        self._scratch, self._most_rows = scratch, most_rows
        self._kernels = torch.ops.lmi_multi if kernels is None else kernels
        # A step program has no `gemm`; it covers no more rows than others do.
        device = scratch.work.device
        self._hopper = kernels is None and _is_hopper(device)
        self._pairs = processors(device) // 2 if self._hopper else 0

    def norm(self, x: Tensor, norm: Norm, eps: float) -> Tensor:
        """See `Ops.norm`."""
        out = torch.empty_like(x, dtype=norm.weight.dtype)
        if self._kernels.norm(x, norm.weight, norm.bias, eps, out):
            return out
        return super().norm(x, norm, eps)

    def linear(
        self, x: Tensor, linear: Linear, activation: Activation | None = None, gated: bool = False
    ) -> Tensor:
        """See `Ops.linear`."""
        dtype = linear.weight.dtype if linear.scale is None else x.dtype
        out = self._in_one(x, linear, dtype, activation=activation, gated=gated)
        if out is not None:
            return out
        weight, bias = linear.weight, linear.bias
        if (
            bias is not None
            and activation in EPILOGUES
            and not gated
            and weight.dtype in (torch.float16, torch.bfloat16)
            and x.dtype == bias.dtype == weight.dtype
        ):  # the activation in the product's own kernel
            use_gelu = activation == "gelu_tanh"
            return torch._addmm_activation(bias, x, weight.t(), use_gelu=use_gelu)
        return super().linear(x, linear, activation, gated)

    def activate(self, y: Tensor, activation: Activation, gated: bool = False) -> Tensor:
        """See `Reference.activate`."""
        out = y.new_empty((*y.shape[:-1], y.shape[-1] // 2 if gated else y.shape[-1]))
        if self._kernels.activate(y, ACTIVATIONS[activation], gated, out):
            return out
        return super().activate(y, activation, gated)

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
        rows = x.shape[0]
        # The kernel for tensor cores wants x normalized before.
        if rows <= self._most_rows[linear.weight.dtype] and not self._by_gemm(rows, linear):
            dtype = (linear if linear.scale is None else norm).weight.dtype
            out = self._fused(x, linear, dtype, norm, eps, activation=activation, gated=gated)
            if out is not None:
                return out
        return super().norm_linear(x, norm, eps, linear, activation, gated)

    def linear_residual(self, x: Tensor, linear: Linear, residual: Tensor) -> Tensor:
        """See `Ops.linear_residual`."""
        out = self._in_one(x, linear, residual.dtype, residual=residual)
        if out is not None:
            return out
        weight = linear.weight
        if linear.bias is None and x.dtype == weight.dtype == residual.dtype:
            return residual.addmm_(x, weight.t())  # the sum in the product's own kernel
        return super().linear_residual(x, linear, residual)

    def _widened(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        out, unit = torch.empty_like(codes, dtype=dtype), unit_of(codes.dtype, dtype)
        if self._kernels.widen(codes, 1 / unit, out):
            return out, (scale * unit).to(dtype)
        return super()._widened(codes, scale, dtype)

    def _in_one(
        self,
        x: Tensor,
        linear: Linear,
        dtype: torch.dtype,
        residual: Tensor | None = None,
        activation: Activation | None = None,
        gated: bool = False,
    ) -> Tensor | None:
        """A product, and what follows it, in one kernel; None where none covers it."""
        rows, out = x.shape[0], None
        if self._by_gemm(rows, linear) or self._by_large(rows, linear, activation, gated):
            out = self._gemm(x, linear, dtype, residual, activation, gated)
        if out is None and rows <= self._most_rows[linear.weight.dtype]:
            out = self._fused(x, linear, dtype, None, 0.0, residual, activation, gated)
        return out

    def _by_gemm(self, rows: int, linear: Linear) -> bool:
        """Whether a product of so many rows is best done by Hopper's tensor cores."""
        if not self._hopper or not GEMM_ROWS <= rows <= MOST_GEMM_ROWS:
            return False
        return linear.scale is not None or (
            rows <= MOST_SMALL_ROWS and linear.weight.nbytes <= SMALL
        )

    def _by_large(
        self, rows: int, linear: Linear, activation: Activation | None, gated: bool
    ) -> bool:
        """Whether a product of many rows and its activation are best done by a kernel of ours."""
        weight = linear.weight
        if not self._pairs or rows < LARGE_ROWS or weight.shape[1] < LARGE_FEATURES:
            return False
        # It rounds sums to x's type before a bias, which may be most of them with the other sign.
        if linear.scale is not None or linear.bias is not None:
            return False
        if not gated and activation is None:
            return False
        columns = -(-weight.shape[0] // LARGE_TILE)
        tiles = -(-rows // LARGE_TILE) * columns
        rounds = -(-tiles // self._pairs)
        return tiles >= LARGE_SHARE * rounds * self._pairs

    def _gemm(
        self,
        x: Tensor,
        linear: Linear,
        dtype: torch.dtype,
        residual: Tensor | None = None,
        activation: Activation | None = None,
        gated: bool = False,
    ) -> Tensor | None:
        """`_in_one` by Hopper's tensor cores."""
        out = _empty(x, linear, dtype, gated)
        given = (x, linear.weight, linear.scale, linear.bias, residual, ACTIVATIONS[activation])
        done = self._kernels.gemm(*given, gated, self._scratch.work, self._scratch.counters, out)
        return out if done else None

    def _fused(
        self,
        x: Tensor,
        linear: Linear,
        dtype: torch.dtype,
        norm: Norm | None = None,
        eps: float = 0.0,
        residual: Tensor | None = None,
        activation: Activation | None = None,
        gated: bool = False,
        splits: int = 0,
    ) -> Tensor | None:
        """Everything in one kernel, in `dtype`; None where that is not covered.

        `splits`: in how many parts at least a product's inputs are summed.
        """
        out = _empty(x, linear, dtype, gated)
        scratch = self._scratch
        done = self._kernels.linear(
            x,
            linear.weight,
            linear.scale,
            linear.bias,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            eps,
            residual,
            ACTIVATIONS[activation],
            gated,
            splits,
            scratch.work,
            scratch.counters,
            out,
        )
        return out if done else None


def _empty(x: Tensor, linear: Linear, dtype: torch.dtype, gated: bool) -> Tensor:
    """Where a product goes."""
    outputs = linear.weight.shape[0] // 2 if gated else linear.weight.shape[0]
    return x.new_empty((x.shape[0], outputs), dtype=dtype)


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def processors(device: torch.device) -> int:
    """How many the GPU has, which run blocks side by side."""
    return torch.cuda.get_device_properties(device).multi_processor_count
