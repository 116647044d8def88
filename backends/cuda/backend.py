"""NVIDIA GPUs with compiled kernels where they are built, else torch; one process a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from lmi_multi.backends.base import Availability, Executor, Limits
from lmi_multi.backends.limits import plan_limits
from lmi_multi.backends.torch_executor import TorchExecutor
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.errors import CapacityError
from lmi_multi.models.schema import check_degree
from lmi_multi.models.stages import Stage
from lmi_multi.ops.reference import Reference
from lmi_multi.parallel import torchrun
from lmi_multi.parallel.executor import identity, open_ranks
from lmi_multi.parallel.grid import Grid, connect

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
        pipeline_parallel: int = 1,
        max_batch: int | None,
        max_tokens: int | None,
    ) -> Executor:
        """See `Backend.load`."""
        spec, grid = artifact.spec, Grid(tensor_parallel, pipeline_parallel)
        check_degree(spec, grid.tensor)
        stages = artifact.stages(grid.pipeline)
        devices = _devices(grid)
        limits = plan_limits(
            spec,
            item_bytes=4 if artifact.dtype == "fp32" else 2,
            ranks=grid.tensor,
            memory=_cache_memory(artifact, grid, stages, devices),
            layers=max(len(stage.decoder) for stage in stages),
            max_batch=max_batch,
            max_tokens=max_tokens,
            default_batch=64,
        )
        build = partial(_build_rank, artifact.folder, grid, devices)
        if grid.size == 1:
            return build(limits, 0, 1)
        named = ", ".join(_describe(device) for device in devices.values())
        return open_ranks(grid, build, limits, named, "nccl", identity(artifact, grid))


def _devices(grid: Grid) -> dict[int, int]:
    """The GPU of every rank on this host that this process speaks for: all, or, under torchrun,
    its own. Raises CapacityError where there are too few."""
    count = torch.cuda.device_count()
    if job := torchrun.job(grid.tensor, grid.pipeline):
        if job.local_rank >= count:
            raise CapacityError(
                f"LOCAL_RANK is {job.local_rank}, but this machine has {count} GPUs; allowed: as "
                "many processes as there are GPUs"
            )
        return {job.rank: job.local_rank}
    if grid.size > count:
        raise CapacityError(
            f"tensor_parallel {grid.tensor} x pipeline_parallel {grid.pipeline} is {grid.size}, "
            f"but this machine has {count} GPUs"
        )
    return {rank: rank for rank in range(grid.size)}


def _describe(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _cache_memory(
    artifact: Artifact, grid: Grid, stages: Sequence[Stage], devices: Mapping[int, int]
) -> int:
    """Bytes a rank may spend on its cache. Raises CapacityError if its weights do not fit."""
    names = [tensor.name for tensor in artifact.stored]
    budgets = []
    for rank, device in devices.items():
        held = stages[grid.stage_of(rank)].tensors(names)
        weights = artifact.tensor_bytes(grid.slice_of(rank), grid.tensor, held)
        free, _ = torch.cuda.mem_get_info(device)
        if weights > free:
            raise CapacityError(
                f"rank {rank} needs {weights / 2**30:.2f} GiB for weights, but {free / 2**30:.2f} "
                f"GiB of cuda:{device} are free; try a higher tensor_parallel or "
                "pipeline_parallel, dtype='bf16' or quantize='int8'"
            )
        budgets.append(int((free - weights) * CACHE_SHARE))
    return min(budgets)


def _build_rank(
    folder: Path, grid: Grid, devices: Mapping[int, int], limits: Limits, rank: int, size: int
) -> Executor:
    artifact = Artifact.open(folder)
    device = torch.device("cuda", devices[rank])
    torch.cuda.set_device(device)
    stage = artifact.stages(grid.pipeline)[grid.stage_of(rank)]
    names = stage.tensors(tensor.name for tensor in artifact.stored)
    tensors = load_rank(artifact, grid.slice_of(rank), grid.tensor, device, names)
    collectives = connect(grid, rank, stage)
    if kernels.missing():
        return TorchExecutor(artifact.spec, tensors, limits, Reference(), collectives)
    scratch = Scratch(device, limits.max_batch * artifact.spec.heads)
    # A captured step would hold the messages between stages: that is not done yet.
    captured = grid.pipeline == 1
    return CudaExecutor(artifact.spec, tensors, limits, scratch, collectives, captured)
