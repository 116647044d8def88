"""The CPU backend: plain torch, one process a rank."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil

from lmi_multi.backends.base import Availability, Executor, Limits
from lmi_multi.backends.limits import plan_limits
from lmi_multi.backends.memory import Device
from lmi_multi.backends.torch_executor import TorchExecutor
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.share import Share
from lmi_multi.errors import CapacityError
from lmi_multi.models.schema import check_degree
from lmi_multi.models.stages import Stage
from lmi_multi.ops.cpu import CpuOps
from lmi_multi.parallel.collectives import SingleRank
from lmi_multi.parallel.executor import identity, open_ranks
from lmi_multi.parallel.grid import Grid, connect

CACHE_SHARE = 0.5  # of the memory that the weights leave, where nobody says


class CpuBackend:
    """`lmi_multi.backends.base.Backend` for any machine."""

    name = "cpu"

    def probe(self) -> Availability:
        """Always available."""
        cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
        model = platform.processor() or platform.machine()
        return Availability("cpu", True, "always available", devices=(f"{model}, {cores} cores",))

    def check_load(
        self, *, tensor_parallel: int, pipeline_parallel: int, quantize: str | None
    ) -> None:
        """See `Backend.check_load`. Processes are not short here."""

    def load(
        self,
        artifact: Artifact,
        *,
        tensor_parallel: int,
        pipeline_parallel: int = 1,
        max_batch: int | None,
        max_tokens: int | None,
        memory_share: float | None = None,
    ) -> Executor:
        """See `Backend.load`."""
        spec, grid = artifact.spec, Grid(tensor_parallel, pipeline_parallel)
        check_degree(spec, grid.tensor)
        stages = artifact.stages(grid.pipeline)
        limits = plan_limits(
            spec,
            item_bytes=4 if artifact.dtype == "fp32" else 2,
            ranks=grid.tensor,
            memory=_cache_memory(artifact, grid, stages, memory_share),
            layers=max(len(stage.decoder) for stage in stages),
            max_batch=max_batch,
            max_tokens=max_tokens,
        )
        if grid.size == 1:
            return TorchExecutor(spec, artifact.load_rank(0, 1), limits, CpuOps(), SingleRank())
        build = partial(_build_rank, artifact.folder, grid)
        device = f"{grid.size} processes"
        return open_ranks(grid, build, limits, device, "gloo", identity(artifact, grid))


def _cache_memory(
    artifact: Artifact, grid: Grid, stages: Sequence[Stage], memory_share: float | None
) -> int:
    """Bytes that each rank may spend on its cache. Raises CapacityError if weights do not fit."""
    names = [tensor.name for tensor in artifact.stored]
    weights = grid.tensor * sum(
        artifact.tensor_bytes(0, grid.tensor, stage.tensors(names)) for stage in stages
    )
    memory = psutil.virtual_memory()
    host = Device("the host", memory.total, memory.available)
    room = host.free if memory_share is None else host.budget(memory_share)
    if weights > room:
        raise CapacityError(
            f"the weights need {weights / 2**30:.2f} GiB of memory, but {room / 2**30:.2f} GiB are "
            "free; try dtype='bf16' or quantize='int8' or 'fp8'"
        )
    share = CACHE_SHARE if memory_share is None else 1.0
    return int((room - weights) * share / grid.size)


def _build_rank(folder: Path, grid: Grid, limits: Limits, rank: int, size: int) -> Executor:
    artifact = Artifact.open_share(folder, Share(grid.slice_of(rank), grid.tensor))
    stage = artifact.stages(grid.pipeline)[grid.stage_of(rank)]
    names = stage.tensors(tensor.name for tensor in artifact.stored)
    tensors = artifact.load_rank(grid.slice_of(rank), grid.tensor, names)
    collectives = connect(grid, rank, stage)
    return TorchExecutor(artifact.spec, tensors, limits, CpuOps(), collectives)


BACKEND = CpuBackend()
