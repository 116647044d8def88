"""The hardware matrix: its cells, and how each backend opens an executor for one.

A backend joins by an entry in `OPENERS`; the tests in test_matrix.py are written once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmi_multi import backends
from lmi_multi.backends.base import Executor, Limits
from lmi_multi.backends.torch_executor import TorchExecutor
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.engine.batch import Batch, Passage, Prompt, StepResult
from lmi_multi.ops.cpu import CpuOps
from lmi_multi.parallel.collectives import SingleRank, TorchCollectives
from lmi_multi.parallel.grid import Grid
from lmi_multi.parallel.local import LocalRanks
from tests.families import FAMILIES

OPENING = 100.0  # seconds that a network's opening may take: the first one's on a GPU
LIMITS = Limits(max_batch=4, max_tokens=120, max_step_tokens=64, blocks=96, block_size=8)


@dataclass(frozen=True)
class Cell:
    """One combination; its string is the test's id."""

    backend: str
    family: str
    dtype: str
    degree: int

    def __str__(self) -> str:
        return f"{self.backend}-{self.family}-{self.dtype}-tp{self.degree}"


@dataclass(frozen=True)
class Outcome:
    """What became of a cell."""

    cell: Cell
    result: str
    reason: str


CELLS: list[Outcome] = []


def cells(families: Sequence[str], dtypes: Sequence[str] = ("fp32", "bf16", "fp16")) -> list[Cell]:
    """The cells of `families` on every backend: float32 at all degrees, half types on one rank."""
    return [
        Cell(backend, family, dtype, degree)
        for backend in backends.MODULES
        for family, tiny in FAMILIES.items()
        if family in families
        for dtype in dtypes
        for degree in (tiny.degrees if dtype == "fp32" else (1,))
    ]


def unavailable(cell: Cell) -> str:
    """Why the cell cannot run here; empty if it can."""
    state = backends.probe(cell.backend)
    if not state.ok:
        return f"{cell.backend}: {state.reason}"
    if cell.backend == "neuron" and os.environ.get("LMI_MULTI_NEURON_RUNTIME") != "emulator":
        return "neuron: the matrix is for emulated cores; tests/test_neuron_cores.py is for these"
    if cell.backend == "cuda" and cell.degree > len(state.devices):
        return f"cuda: {cell.degree} GPUs wanted, {len(state.devices)} here"
    return ""


@contextmanager
def executor(cell: Cell, artifact: Artifact) -> Iterator[Executor]:
    """The cell's executor with `LIMITS`, closed afterwards."""
    opened = OPENERS[cell.backend](artifact, cell.degree)
    try:
        yield opened
    finally:
        opened.close()


def _open_cpu(artifact: Artifact, degree: int) -> Executor:
    if degree == 1:
        tensors = artifact.load_rank(0, 1)
        return TorchExecutor(artifact.spec, tensors, LIMITS, CpuOps(), SingleRank())
    return SharedRanks(_ranks(degree), artifact.folder)


def _open_cuda(artifact: Artifact, degree: int) -> Executor:
    limits = _limits(artifact)
    if degree > 1:
        return SharedRanks(_ranks(degree, CudaShelf, "nccl"), artifact.folder, limits)
    return backends.get("cuda").load(
        artifact, tensor_parallel=1, max_batch=limits.max_batch, max_tokens=limits.max_tokens
    )


def _open_neuron(artifact: Artifact, degree: int) -> Executor:
    from lmi_multi.backends.neuron.emulator import EmulatorRuntime
    from lmi_multi.backends.neuron.loading import open_executor

    return open_executor(artifact, degree, _limits(artifact), EmulatorRuntime())


def _limits(artifact: Artifact) -> Limits:
    """`LIMITS` that the network's positions allow."""
    longest = min(LIMITS.max_tokens, artifact.spec.max_positions or LIMITS.max_tokens)
    return replace(LIMITS, max_tokens=longest)


OPENERS: dict[str, Callable[[Artifact, int], Executor]] = {
    "cpu": _open_cpu,
    "cuda": _open_cuda,
    "neuron": _open_neuron,
}


class Shelf:
    """Lives in every rank and opens one artifact after another: starting ranks takes seconds."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.executor: TorchExecutor | None = None

    def open(self, folder: Path) -> None:
        """Load this rank's share of an artifact."""
        artifact = Artifact.open(folder)
        tensors = artifact.load_rank(self.rank, self.size)
        self.executor = TorchExecutor(artifact.spec, tensors, LIMITS, CpuOps(), TorchCollectives())

    def use(self, method: str, *arguments: Any) -> Any:
        """Call the open executor."""
        return getattr(self.executor, method)(*arguments)


class CudaShelf(Shelf):
    """The same on a GPU of its own, opened as `load` does it in each of its processes."""

    def open(self, folder: Path) -> None:
        """See `Shelf.open`."""
        from lmi_multi.backends.cuda.backend import _open

        if self.executor is not None:
            self.executor.close()
        device = torch.device("cuda", self.rank)
        torch.cuda.set_device(device)
        artifact = Artifact.open(folder)
        opened: Any = _open(artifact, Grid(self.size), _limits(artifact), self.rank, device)
        self.executor = opened


_RANKS: dict[tuple[int, str], LocalRanks] = {}


def _ranks(size: int, shelf: type[Shelf] = Shelf, process_group: str = "gloo") -> LocalRanks:
    """The session's processes, which end with it; others once one of them has failed."""
    known = _RANKS.get((size, process_group))
    if known is None or any(rank.ended for rank in known.ranks):
        known = _RANKS[size, process_group] = LocalRanks(size, shelf, process_group)
    return known


@dataclass
class SharedRanks:
    """An executor on the session's ranks."""

    ranks: LocalRanks
    folder: Path
    limits: Limits = LIMITS
    device: str = "cpu ranks"

    def __post_init__(self) -> None:
        self.ranks.call("open", self.folder, still=OPENING)

    def step(self, batch: Batch) -> StepResult:
        result: StepResult = self.ranks.call("use", "step", batch)
        return result

    def logits(self, batch: Batch) -> Tensor:
        result: Tensor = self.ranks.call("use", "logits", batch)
        return result

    def encode(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor | None]:
        result: tuple[Tensor, Tensor | None] = self.ranks.call("use", "encode", prompts)
        return result

    def score(self, passages: Sequence[Passage]) -> Tensor:
        result: Tensor = self.ranks.call("use", "score", passages)
        return result

    def close(self) -> None:
        """The ranks stay for the next cell."""
