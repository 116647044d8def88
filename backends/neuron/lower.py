"""From a module and a trace to HLO, by torch-xla on one CPU device that stands for rank 0."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from lmi_multi.errors import BackendError
from lmi_multi.parallel.pipeline import OneStage

from . import lint
from .program import Trace


@dataclass(frozen=True)
class Graph:
    """`program.Lowered`, and what its inputs and outputs mean.

    `parameters[i]` is the name of input i: a buffer's, or `input.` and the trace's name of it;
    those in `constants` have a value instead. The outputs are the module's, `outputs` of them, and
    then the state in the order of `state`.
    """

    tag: str
    proto: bytes
    text: str
    parameters: Sequence[str]
    constants: dict[int, Tensor]
    outputs: int
    state: Sequence[str]

    @property
    def digest(self) -> str:
        """See `Lowered.digest`. Where inputs come from is found anew whenever it is lowered."""
        return hashlib.sha256(self.proto).hexdigest()

    @property
    def instructions(self) -> int:
        """See `Lowered.instructions`."""
        return sum(" = " in line for line in self.text.splitlines())


class TraceCollectives:
    """`lmi_multi.parallel.collectives.Collectives` as operations of the traced graph.

    Every rank runs what rank 0 traced, so `rank` is 0 for all: nothing in Python may depend on it.
    """

    rank = 0
    pipeline = OneStage()

    def __init__(self, size: int) -> None:
        self.size, self.alone = size, size == 1
        self._groups = [list(range(size))]

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum in float32: half types would round between the additions."""
        if self.size == 1:
            return x
        import torch_xla.core.xla_model as xm

        total: Tensor = xm.all_reduce(xm.REDUCE_SUM, x.float(), groups=self._groups)
        return total.to(x.dtype)

    def add_reduced(self, residual: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `Collectives.add_reduced`."""
        total = self.all_reduce(x)
        return residual + (total if bias is None else total + bias)

    def all_gather(self, x: Tensor) -> Tensor:
        """Concatenate along the last dimension in rank order."""
        if self.size == 1:
            return x
        import torch_xla.core.xla_model as xm

        # With a pinned layout the tracer would bake its own rank into the graph.
        whole: Tensor = xm.all_gather(x, x.dim() - 1, groups=self._groups, pin_layout=False)
        return whole


@contextmanager
def as_rank(rank: int) -> Iterator[None]:
    """torch-xla believes that this process is `rank`."""
    with mock.patch("torch_xla.runtime.global_ordinal", return_value=rank):
        yield


@contextmanager
def _world(size: int) -> Iterator[None]:
    """torch-xla believes that there are `size` ranks."""
    with mock.patch("torch_xla.runtime.world_size", return_value=size):
        yield


class Lowering:
    """Lowers traces of one module, whose buffers are moved to the tracing device once."""

    def __init__(self, module: nn.Module, state: Sequence[str], ranks: int) -> None:
        os.environ.setdefault("PJRT_DEVICE", "CPU")
        import torch_xla

        self._xla: Any = torch_xla
        self._state, self._ranks = list(state), ranks
        self._module = copy.deepcopy(module).to(torch_xla.device())
        self._start = dict(self._module.named_buffers())
        torch_xla.sync()

    def lower(self, trace: Trace) -> Graph:
        """The graph of a trace, linted, and traced again as the last rank, which must make no
        difference. Raises BackendError that names it."""
        graph = self._trace(trace, 0)
        lint.check(graph, self._ranks, trace.bounds)
        if self._ranks > 1:
            lint.check_same(graph, self._trace(trace, self._ranks - 1))
        return graph

    def _trace(self, trace: Trace, rank: int) -> Graph:
        device = self._xla.device()
        inputs = {name: x.to(device) for name, x in trace.examples().items()}
        self._xla.sync()
        try:
            with torch.no_grad(), _world(self._ranks), as_rank(rank):
                outputs = list(self._module(**inputs))
                return self._build(trace.tag, inputs, outputs)
        except Exception as error:  # whatever torch-xla raises
            raise BackendError(f"graph {trace.tag} cannot be lowered: {error}") from error
        finally:
            for name in self._state:  # the next trace starts from the same buffers
                setattr(self._module, name, self._start[name])

    def _build(self, tag: str, inputs: dict[str, Tensor], outputs: list[Tensor]) -> Graph:
        new = dict(self._module.named_buffers())
        kept = [name for name in self._state if new[name] is self._start[name]]
        if kept:
            raise BackendError(f"state is not rebound: {', '.join(kept)}")
        context = self._xla._XLAC.lowering.LoweringContext()
        context.build(outputs + [new[name] for name in self._state])
        given = context.parameter_id_tensor_mapping()
        named = {f"input.{name}": x for name, x in inputs.items()} | self._start
        proto: bytes = context.hlo()
        places = {context.tensor_parameter_id(x): name for name, x in named.items()}
        return Graph(
            tag=tag,
            proto=proto,
            text=hlo_text(proto),
            parameters=[places.get(i, "") for i in range(len(given))],
            constants={i: given[i].cpu() for i in range(len(given)) if i not in places},
            outputs=len(outputs),
            state=self._state,
        )


def hlo_text(proto: bytes) -> str:
    """A module in HLO's text form."""
    import torch_xla.core.xla_builder as xla_builder

    computation = xla_builder.computation_from_module_proto("graph", proto)
    text: str = xla_builder.get_computation_hlo(computation)
    return text
