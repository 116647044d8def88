"""NVIDIA GPUs with compiled kernels where they are built, else torch; one process a GPU."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from lmi_multi.backends.base import Availability, Executor, Limits
from lmi_multi.backends.memory import Device
from lmi_multi.backends.torch_executor import TorchExecutor
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.share import Share
from lmi_multi.errors import BackendError, CapacityError, first_line
from lmi_multi.models.schema import check_degree
from lmi_multi.network import Network
from lmi_multi.ops.reference import Reference
from lmi_multi.parallel import torchrun
from lmi_multi.parallel.collectives import TorchCollectives
from lmi_multi.parallel.executor import identity, open_ranks
from lmi_multi.parallel.grid import Grid, connect

from . import kernels
from .executor import CudaExecutor
from .loading import load_rank
from .near import connect_memory
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

    def check_load(
        self, *, tensor_parallel: int, pipeline_parallel: int, quantize: str | None
    ) -> None:
        """See `Backend.check_load`. Raises CapacityError for fewer GPUs than ranks."""
        if type(pipeline_parallel) is int:
            _devices(Grid(tensor_parallel, pipeline_parallel))

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
        grid = Grid(tensor_parallel, pipeline_parallel)
        check_degree(artifact.spec, grid.tensor)
        network = Network.of(artifact, str(artifact.folder))
        devices = _devices(grid)
        ranks = [rank for rank in devices if rank < grid.size]
        gpus = {rank: _device(devices[rank]) for rank in ranks}
        spare = partial(_answering, {r: i for r, i in devices.items() if r not in gpus})
        sizes = sizes_on(network, gpus, grid, max_batch, max_tokens, memory_share, spare)
        if grid.size == 1:
            with torch.cuda.device(devices[0]):  # the caller's current GPU stays what it is
                return _build(artifact, grid, devices, sizes, sizes.limits, 0)
        build = partial(_build_rank, artifact.folder, grid, devices, sizes)
        names = ", ".join(_describe(devices[rank]) for rank in sizes.ranks)
        return open_ranks(grid, build, sizes.limits, names, "nccl", identity(artifact, grid))


def _devices(grid: Grid) -> dict[int, int]:
    """The GPUs that this process may ask, by the ranks that they are for: all of the machine,
    also those that no rank needs, or, under torchrun, its own. Raises CapacityError where
    there are too few."""
    count = torch.cuda.device_count()
    if job := torchrun.job(grid.tensor, grid.pipeline):
        return {job.rank: torchrun.numbered_gpu(job, count)}
    if grid.size == 1 and (own := torchrun.own_gpu(count)) is not None:
        return {0: own}
    if grid.size > count:
        raise CapacityError(
            f"tensor_parallel {grid.tensor} x pipeline_parallel {grid.pipeline} is {grid.size}, "
            f"but this machine has {count} GPUs"
        )
    return {index: index for index in range(count)}


def _describe(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _device(index: int) -> Device:
    """What is free of a GPU, which this opens. Raises BackendError if it cannot be told."""
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        raise BackendError(f"cuda:{index} cannot be used: {first_line(error)}") from None
    return Device(f"cuda:{index}", total, free)


def _answering(devices: Mapping[int, int]) -> dict[int, Device]:
    """Those of the GPUs that can tell: others may be full, or somebody else's alone."""
    found = {}
    for rank, index in devices.items():
        with suppress(BackendError):
            found[rank] = _device(index)
    return found


def _build_rank(
    folder: Path,
    grid: Grid,
    devices: Mapping[int, int],
    sizes: Sizes,
    limits: Limits,
    rank: int,
    size: int,
) -> Executor:
    share = Share(grid.slice_of(rank), grid.tensor)
    artifact = Artifact.open_share(folder, share)
    return _build(artifact, grid, devices, sizes, limits, rank)


def _build(
    artifact: Artifact,
    grid: Grid,
    devices: Mapping[int, int],
    sizes: Sizes,
    limits: Limits,
    rank: int,
) -> Executor:
    """The executor of a rank; what of the GPU it takes is logged beside what was planned.

    Of one that cannot be made nothing is left. Raises CapacityError if the GPU has no room after
    all."""
    index = devices[rank]
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    free = _device(index).free
    try:
        executor = _open(artifact, grid, limits, rank, device)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # tensors are theirs
        with suppress(RuntimeError):  # a GPU that has failed gives nothing back
            torch.cuda.empty_cache()
        if isinstance(error, torch.OutOfMemoryError):
            raise CapacityError(
                f"cuda:{index} has no room for the model after all: {first_line(error)}"
            ) from None
        raise
    taken = free - _device(index).free
    log.info("rank %d on cuda:%d: %s", rank, index, sizes.compared(rank, limits, taken))
    return executor


def _open(
    artifact: Artifact, grid: Grid, limits: Limits, rank: int, device: torch.device
) -> Executor:
    stage = artifact.stages(grid.pipeline)[grid.stage_of(rank)]
    names = stage.tensors(tensor.name for tensor in artifact.stored)
    tensors = load_rank(artifact, grid.slice_of(rank), grid.tensor, device, names)
    peers = connect(grid, rank, stage)
    missing = kernels.missing()
    if peers.least(not missing) == 0:  # on any host: ranks work alike
        if not missing:
            log.warning("rank %d does without compiled kernels, as another rank has none", rank)
        return TorchExecutor(artifact.spec, tensors, limits, Reference(), peers)
    if isinstance(peers, TorchCollectives):
        connect_memory(peers, device)
    scratch = Scratch(device, limits.max_batch * artifact.spec.heads)
    return CudaExecutor(artifact.spec, tensors, limits, scratch, peers)
