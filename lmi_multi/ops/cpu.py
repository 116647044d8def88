"""The fused operations as the CPU runs them: the reference, with faster products for few rows."""

from __future__ import annotations

from torch import Tensor

from lmi_multi.ops.reference import Reference

# Rows of x from which, and up to which, the transposed product is the faster one. Measured with
# oneDNN and MKL as torch ships them: see docs/performance-notes.md.
FEWEST_ROWS = {2: 1, 4: 8}  # by bytes of an element
MOST_ROWS = 32


class CpuOps(Reference):
    """`lmi_multi.ops.Ops` for the CPU."""

    def _matmul(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The libraries split the long dimension over cores and registers better when it comes
        first: (weight @ x.T).T is the same product."""
        if not FEWEST_ROWS[x.element_size()] <= x.shape[0] <= MOST_ROWS:
            return super()._matmul(x, weight, bias)
        y = (weight @ x.t()).t().contiguous()
        return y if bias is None else y.add_(bias)
