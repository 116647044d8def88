"""The operations as the CPU runs them: the reference, with faster ways for few rows."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from lmi_multi.ops.heads import Heads
from lmi_multi.ops.reference import Reference

# How many rows of x a transposed product may have for it to be the faster one, by the CPU's maker
# and the bytes of an element. Measured with oneDNN and MKL as torch ships them, which take other
# kernels on each maker's CPUs: see docs/performance-notes.md. Fixed figures and not a measurement
# at start, so that the same host always rounds the same way.
TRANSPOSED = {
    "GenuineIntel": {2: range(1, 33), 4: range(8, 33)},
    "AuthenticAMD": {2: range(0), 4: range(1, 33)},
}
# A product with a single column goes to the libraries' matrix-vector kernels, which the wider
# products beat on these CPUs though they compute a column of zeros too.
WIDENED = {"AuthenticAMD"}
# Where torch's attention multiplies half types one by one: widening keys and values costs less.
WIDE_ATTENTION = {"AuthenticAMD"}


@functools.cache
def maker(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's maker as the kernel names it; Intel's name where it is not told."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id"))
    name = next(names, "")
    return name if name in TRANSPOSED else "GenuineIntel"


class CpuHeads(Heads):
    """`Heads` whose single queries of half types are attended in float32 where that is faster."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool
    ) -> Tensor:
        """See `Heads.attend`."""
        if q.dtype == torch.float32 or q.shape[1] > 1 or maker() not in WIDE_ATTENTION:
            return super().attend(q, k, v, bias, scale, causal)
        wide = None if bias is None else bias.float()
        out = super().attend(q.float(), k.float(), v.float(), wide, scale, causal)
        return out.to(q.dtype)


class CpuOps(Reference):
    """`lmi_multi.ops.Ops` for the CPU."""

    heads = CpuHeads

    def __init__(self) -> None:
        name = maker()
        self.transposed, self.widened = TRANSPOSED[name], name in WIDENED

    def _matmul(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The libraries split the long dimension over cores and registers better when it comes
        first: (weight @ x.T).T is the same product."""
        rows = x.shape[0]
        if rows not in self.transposed.get(x.element_size(), ()):
            return super()._matmul(x, weight, bias)
        if rows == 1 and self.widened:
            x = torch.cat((x, torch.zeros_like(x)))
        y = (weight @ x.t()).t()[:rows].contiguous()
        return y if bias is None else y.add_(bias)
