"""NVIDIA GPUs with compiled kernels where they are built, else torch; one process a GPU."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch

from lmi_multi.backends.base import Availability, Executor, Limits
from lmi_multi.backends.memory import Device
from lmi_multi.backends.torch_executor import TorchExecutor
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.errors import CapacityError
from lmi_multi.fit import Network
from lmi_multi.models.schema import check_degree
from lmi_multi.ops.reference import Reference
from lmi_multi.parallel.collectives import SingleRank, TorchCollectives
from lmi_multi.parallel.executor import RankedExecutor

from . import kernels
from .executor import CudaExecutor
from .loading import load_rank
from .ops import Scratch
from .sizing import Sizes, sizes_on

log = logging.getLogger(__name__)


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
        memory_share: float | None = None,
    ) -> Executor:
        """See `Backend.load`."""
        spec, degree = artifact.spec, tensor_parallel
        check_degree(spec, degree)
        count = torch.cuda.device_count()
        if degree > count:
            raise CapacityError(f"tensor_parallel is {degree}, but this machine has {count} GPUs")
        network = Network.of(artifact, str(artifact.folder))
        devices = [_device(i) for i in range(count)]
        sizes = sizes_on(network, devices, degree, max_batch, max_tokens, memory_share)
        build = partial(_build_rank, artifact.folder, sizes)
        if degree == 1:
            return build(0, 1)
        names = ", ".join(_describe(i) for i in range(degree))
        return RankedExecutor(degree, build, sizes.limits, names, process_group="nccl")


def _describe(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _device(index: int) -> Device:
    free, total = torch.cuda.mem_get_info(index)
    return Device(f"cuda:{index}", total, free)


def _build_rank(folder: Path, sizes: Sizes, rank: int, size: int) -> Executor:
    artifact = Artifact.open(folder)
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    free = _device(rank).free
    executor = _open(artifact, sizes.limits, rank, size, device)
    log.info("cuda:%d: %s", rank, sizes.compared(free - _device(rank).free))
    return executor


def _open(
    artifact: Artifact, limits: Limits, rank: int, size: int, device: torch.device
) -> Executor:
    tensors = load_rank(artifact, rank, size, device)
    collectives = SingleRank() if size == 1 else TorchCollectives()
    if kernels.missing():
        return TorchExecutor(artifact.spec, tensors, limits, Reference(), collectives)
    scratch = Scratch(device, limits.max_batch * artifact.spec.heads)
    return CudaExecutor(artifact.spec, tensors, limits, scratch, collectives)
