"""NVIDIA GPUs with compiled kernels where they are built, else torch; one process a GPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from lmi_multi.backends.base import Availability, Executor, Limits
from lmi_multi.backends.limits import plan_limits
from lmi_multi.backends.torch_executor import TorchExecutor
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.errors import CapacityError
from lmi_multi.models.schema import check_degree
from lmi_multi.ops.reference import Reference
from lmi_multi.parallel.collectives import SingleRank, TorchCollectives
from lmi_multi.parallel.executor import RankedExecutor

from . import kernels
from .executor import CudaExecutor
from .loading import load_rank
from .ops import Scratch

CACHE_SHARE = 0.8  # of the memory that the weights leave; the rest is workspace


class CudaBackend:
    """`lmi_multi.backends.base.Backend` for the GPUs that torch sees."""

    name = "cuda"

    def probe(self) -> Availability:
        """Available when torch has a CUDA build and sees a GPU."""
        if torch.version.cuda is None:
            return Availability(
                "cuda", False, "torch is a CPU build", "install torch with CUDA from PyPI"
            )
        if not torch.cuda.is_available():
            return Availability(
                "cuda", False, "torch sees no GPU", "check the driver with nvidia-smi"
            )
        names = tuple(_describe(i) for i in range(torch.cuda.device_count()))
        missing = kernels.missing()
        how = f"plain torch, compiled kernels are {missing}" if missing else "compiled kernels"
        return Availability("cuda", True, how, devices=names)

    def load(
        self,
        artifact: Artifact,
        *,
        tensor_parallel: int,
        max_batch: int | None,
        max_tokens: int | None,
    ) -> Executor:
        """See `Backend.load`."""
        spec, degree = artifact.spec, tensor_parallel
        check_degree(spec, degree)
        count = torch.cuda.device_count()
        if degree > count:
            raise CapacityError(f"tensor_parallel is {degree}, but this machine has {count} GPUs")
        limits = plan_limits(
            spec,
            item_bytes=4 if artifact.dtype == "fp32" else 2,
            ranks=degree,
            memory=_cache_memory(artifact, degree),
            max_batch=max_batch,
            max_tokens=max_tokens,
            default_batch=64,
        )
        build = partial(_build_rank, artifact.folder, limits)
        if degree == 1:
            return build(0, 1)
        devices = ", ".join(_describe(i) for i in range(degree))
        return RankedExecutor(degree, build, limits, devices, process_group="nccl")


def _describe(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _cache_memory(artifact: Artifact, degree: int) -> int:
    """Bytes a rank may spend on its cache. Raises CapacityError if its weights do not fit."""
    budgets = []
    for rank in range(degree):
        weights = artifact.tensor_bytes(rank, degree)
        free, _ = torch.cuda.mem_get_info(rank)
        if weights > free:
            raise CapacityError(
                f"rank {rank} needs {weights / 2**30:.2f} GiB for weights, but {free / 2**30:.2f} "
                f"GiB of cuda:{rank} are free; try a higher tensor_parallel, dtype='bf16' or "
                "quantize='int8'"
            )
        budgets.append(int((free - weights) * CACHE_SHARE))
    return min(budgets)


def _build_rank(folder: Path, limits: Limits, rank: int, size: int) -> Executor:
    artifact = Artifact.open(folder)
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    tensors = load_rank(artifact, rank, size, device)
    collectives = SingleRank() if size == 1 else TorchCollectives()
    if kernels.missing():
        return TorchExecutor(artifact.spec, tensors, limits, Reference(), collectives)
    scratch = Scratch(device, limits.max_batch * artifact.spec.heads)
    return CudaExecutor(artifact.spec, tensors, limits, scratch, collectives)
