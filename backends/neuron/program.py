"""The narrow protocol behind which runtimes differ: traces in, programs out.

    runtime.builder(module, state, ranks)   one module for a number of cores
        .lower(trace) -> Lowered            trace it: what the compiler is given, and its digest
        .compile(lowered) -> bytes          the compiler, minutes long; several at once
        .assemble(graphs) -> Program        load what was compiled, now or long ago

Between `compile` and `assemble` stands `cache.Cache`, which keeps the bytes and knows nothing else
of a runtime than its `Toolchain`; `graphs.Graphs` joins the three.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Trace:
    """One graph to be: its tag, and the shapes of the inputs by which it is traced. Inputs are
    int64 but for the float32 ones among `floats`. Those that index something have a bound: a device
    does not check where it reads and writes, so `NeuronExecutor` checks inputs before it runs them.
    """

    tag: str
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    bounds: Mapping[str, int] = field(default_factory=dict)
    floats: Set[str] = frozenset()

    def examples(self) -> dict[str, Tensor]:
        """Zeros of these shapes."""
        return {
            name: torch.zeros(shape, dtype=torch.float32 if name in self.floats else torch.int64)
            for name, shape in self.inputs.items()
        }


class Program(Protocol):
    """Compiled graphs that share weights and state, which stay on the device."""

    def load_weights(self, shards: Sequence[Mapping[str, Tensor]]) -> None:
        """One mapping a rank, from the module's buffer names to its tensors; first of all calls."""

    def run(self, tag: str, **inputs: Tensor) -> list[Tensor]:
        """Run a graph on every core; rank 0's outputs without the state, which stays behind."""

    def reset_state(self) -> None:
        """Fill the state with zeros."""

    def close(self) -> None:
        """Free the device. Calling it twice is fine."""


class Lowered(Protocol):
    """A trace as the compiler is given it. Weights are inputs of it, so it holds none."""

    @property
    def tag(self) -> str:
        """The trace's."""

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 of whatever its compiled form depends on, but for the toolchain: the
        same in every process that lowers the same trace of the same module."""

    @property
    def instructions(self) -> int:
        """How many HLO instructions it has."""


G = TypeVar("G", bound=Lowered)


@dataclass(frozen=True)
class Compiled(Generic[G]):
    """A graph and what the compiler made of it."""

    graph: G
    binary: bytes


class Builder(Protocol[G]):
    """Makes the graphs of one module for one number of cores; `G` is its own kind of `Lowered`."""

    def lower(self, trace: Trace) -> G:
        """Trace and lint one graph; one call at a time. Raises BackendError that names it."""

    def compile(self, graph: G) -> bytes:
        """Compile one graph, into bytes that `assemble` understands in any process under the same
        toolchain. Called by several threads at once. Raises BackendError that names the graph
        and has the compiler's message."""

    def assemble(self, graphs: Mapping[str, Compiled[G]]) -> Program:
        """Load compiled graphs, by tag. The mapping makes a graph when it is asked for: who takes
        them all gets them all compiled, who waits for a tag to be run compiles only that.
        Raises BackendError that names a graph whose bytes cannot be loaded."""


@dataclass(frozen=True)
class Toolchain:
    """What compiled graphs depend on beside the graph itself: the runtime's name, the packages
    that compile and load them with their versions, and the compiler's flags, which name the
    hardware they are for."""

    runtime: str
    versions: Mapping[str, str]
    flags: str = ""


class Runtime(Protocol):
    """A way to compile and run. Chosen by LMI_MULTI_NEURON_RUNTIME."""

    @property
    def toolchain(self) -> Toolchain:
        """What its compiled graphs depend on. Cheap: it is asked before anything is loaded."""

    @property
    def device(self) -> str:
        """What it runs on, in the plural, for people."""

    @property
    def lazy(self) -> bool:
        """Whether its programs ask for a graph when it is first run. Other runtimes' graphs are all
        made before `assemble`, several at once."""

    def builder(self, module: nn.Module, state: Sequence[str], ranks: int) -> Builder[Any]:
        """`module` has rank 0's buffers, of which those called `state` are rebound out of place by
        every trace; the others' values may be anything until `Program.load_weights`, only their
        shapes and dtypes matter. Raises BackendError if `ranks` cores cannot be had."""
