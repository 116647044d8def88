"""The narrow protocol behind which runtimes differ: traces in, programs out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Trace:
    """One graph to be: its tag, and the shapes of the inputs by which it is traced. Inputs are
    all int64, so a shape says everything. Those that index something have a bound: a device does
    not check where it reads and writes."""

    tag: str
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    bounds: Mapping[str, int] = field(default_factory=dict)

    def examples(self) -> dict[str, Tensor]:
        """Zeros of these shapes."""
        return {name: torch.zeros(shape, dtype=torch.int64) for name, shape in self.inputs.items()}


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


class Runtime(Protocol):
    """A way to compile and run. Chosen by LMI_MULTI_NEURON_RUNTIME."""

    @property
    def name(self) -> str:
        """As in LMI_MULTI_NEURON_RUNTIME."""

    def compile(
        self, module: nn.Module, state: Sequence[str], traces: Sequence[Trace], ranks: int
    ) -> Program:
        """`module` holds rank 0's weights, and buffers called `state` that every trace rebinds
        out of place. Raises BackendError that names the graph."""
