"""The torch executor with the compiled kernels in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lmi_multi.backends.base import Limits
from lmi_multi.backends.torch_executor import TorchExecutor
from lmi_multi.engine.batch import Row
from lmi_multi.models.spec import ModelSpec
from lmi_multi.ops.paged import PagedAttention
from lmi_multi.parallel.collectives import Collectives

from .attention import CudaPagedAttention, DistanceBias
from .ops import CudaOps, Scratch


class CudaExecutor(TorchExecutor):
    """`TorchExecutor` by `CudaOps`, with decode attention by kernels."""

    def __init__(
        self,
        spec: ModelSpec,
        tensors: Mapping[str, Tensor],
        limits: Limits,
        scratch: Scratch,
        collectives: Collectives,
    ) -> None:
        super().__init__(spec, tensors, limits, CudaOps(scratch), collectives)
        self._scratch, self._biases = scratch, DistanceBias()

    def _attention(self, rows: Sequence[Row]) -> PagedAttention:
        return CudaPagedAttention(self._cache, rows, self._device, self._scratch, self._biases)
