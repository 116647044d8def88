"""NeuronCores through torch-neuronx 2.9 and neuronx-distributed's ModelBuilder V2.

The builder's own units are called one by one, `trace`, `compile` and `NxDModel.add`: the class that
strings them together compiles every graph anew, and here a cache stands between. Nothing of it has
run on a NeuronCore: see docs/neuron.md for what was tried instead.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmi_multi.errors import BackendError
from lmi_multi.instances import Instance

from . import environment, lint, sdk
from .lower import as_rank, hlo_text
from .program import Compiled, Toolchain, Trace
from .ranges import UNTOLD, Interval, reaching, untold

logger = logging.getLogger(__name__)

LOG_LINES = 20  # of the compiler's log in an error


class NxdRuntime:
    """`program.Runtime` that compiles for `instance`, or for and on the cores of this machine.

    Without an instance the cores are taken, by environment variables, when the first builder is
    made, which must be before anything else in the process starts the Neuron runtime. Whether the
    installed SDK fits is for who chooses the runtime to ask: see `runtimes.choose`.
    """

    device = "NeuronCores"
    lazy = False

    def __init__(self, instance: Instance | None = None) -> None:
        self._instance = instance

    @property
    def toolchain(self) -> Toolchain:
        """See `Runtime.toolchain`."""
        return Toolchain("nxd", sdk.installed().versions, self._flags)

    @property
    def _flags(self) -> str:
        name = self._instance.name if self._instance else environment.instance_here()
        return environment.compiler_flags(name)

    def builder(self, module: nn.Module, state: Sequence[str], ranks: int) -> NxdBuilder:
        """See `Runtime.builder`. Raises BackendError for cores that are not there or not free."""
        if self._instance is None:
            environment.take_cores(ranks)
        else:
            environment.compile_for(self._instance.name)
        return NxdBuilder(module, state, ranks, self._flags)


@dataclass(frozen=True)
class NxdGraph:
    """`program.Lowered`: the library's TraceArtifacts, which hold the HLO and what its inputs and
    outputs mean."""

    tag: str
    artifacts: Any

    @property
    def digest(self) -> str:
        """See `Lowered.digest`."""
        return hashlib.sha256(self.artifacts.hlo.SerializeToString()).hexdigest()

    @property
    def text(self) -> str:
        """The module in HLO's text form."""
        return hlo_text(self.artifacts.hlo.SerializeToString())

    @property
    def instructions(self) -> int:
        """See `Lowered.instructions`."""
        return sum(len(part.instructions) for part in self.artifacts.hlo.computations)

    def state_faults(self, state: Iterable[str]) -> Iterator[str]:
        """What is wrong with its state, one line a fault: each must come back in its place."""
        meta = self.artifacts.metaneff
        returned = {}
        for output, given in dict(meta.output_aliases_to).items():
            tensor = meta.input_tensors[given]
            returned[tensor.checkpoint_key.decode()] = (tensor, meta.output_tensors[output])
        for name in state:
            if name not in returned:
                yield f"state {name} does not come back"
                continue
            before, after = ((list(t.shape), t.data_type) for t in returned[name])
            if before != after:
                yield f"state {name} comes in as {before[0]} and goes out as {after[0]}"

    def known(self, listed: Sequence[lint.Instruction], trace: Trace) -> dict[int, Interval]:
        """What its parameters are, by number, as the metadata names them. Nothing is told of one
        that is neither an input nor a buffer, nor of any where shapes show that numbers differ."""
        tensors = self.artifacts.metaneff.input_tensors
        if lint.parameters(listed) != {i: list(t.shape) for i, t in enumerate(tensors)}:
            return dict.fromkeys(lint.parameters(listed), UNTOLD)
        names = {i: t.user_input_key.decode() for i, t in enumerate(tensors) if t.user_input_key}
        inputs = {i: name for i, name in names.items() if name in trace.inputs}
        buffers = {i for i, t in enumerate(tensors) if t.checkpoint_key}
        nobody = {i: UNTOLD for i in range(len(tensors)) if i not in inputs and i not in buffers}
        return nobody | lint.checked(inputs, trace.bounds)


class NxdBuilder:
    """`program.Builder` over the fundamental units of ModelBuilder V2."""

    def __init__(self, module: nn.Module, state: Sequence[str], ranks: int, flags: str) -> None:
        self._module, self._ranks, self._flags = module, ranks, flags
        self._start = {name: module.get_buffer(name) for name in state}
        self._told = False

    def lower(self, trace: Trace) -> NxdGraph:
        """See `Builder.lower`. It is traced again as the last rank: see `lint.rank_faults`."""
        lowered = self._trace(trace)
        text = lowered.text
        lint.refuse(
            trace.tag, [*lint.faults(text, self._ranks), *lowered.state_faults(self._start)]
        )
        self._check_ranges(lowered, lint.instructions(text), trace)
        if self._ranks > 1:
            with as_rank(self._ranks - 1):
                lint.refuse(trace.tag, [*lint.rank_faults(text, self._trace(trace).text)])
        return lowered

    def _check_ranges(
        self, lowered: NxdGraph, listed: Sequence[lint.Instruction], trace: Trace
    ) -> None:
        """Refuse what may leave its range, and say, once a model, what could not be checked."""
        known = lowered.known(listed, trace)
        lint.refuse(trace.tag, [*reaching(listed, known)])
        if left := untold(listed, known):
            level = logging.DEBUG if self._told else logging.WARNING
            self._told = True
            logger.log(
                level,
                "graph %s: gathers and scatters of which nobody knows whether they stay in range, "
                "as the tracer does not tell what all its inputs are: %d, the first is %s",
                trace.tag,
                len(left),
                left[0],
            )

    def _trace(self, trace: Trace) -> NxdGraph:
        from neuronx_distributed.trace import functions

        try:
            with self._world():
                artifacts = functions.trace(
                    self._module, kwargs=trace.examples(), preserve_parameters=True
                )
        except Exception as error:  # whatever the library raises
            raise BackendError(f"graph {trace.tag} cannot be lowered: {_reason(error)}") from error
        finally:
            for name, tensor in self._start.items():  # the next trace starts from the same buffers
                setattr(self._module, name, tensor)
        return NxdGraph(trace.tag, artifacts)

    def compile(self, graph: NxdGraph) -> bytes:
        """See `Builder.compile`: the bytes of a NEFF."""
        from neuronx_distributed.trace import functions

        with tempfile.TemporaryDirectory(prefix="lmi-multi-neuron-") as folder:
            try:
                compiled = functions.compile(
                    graph.artifacts.hlo,
                    graph.artifacts.metaneff,
                    compiler_workdir=folder,
                    compiler_args=self._flags,
                    key=graph.tag,
                )
                neff: bytes = compiled.get_neff_bytes()
            except Exception as error:  # the compiler's, wrapped in the library's
                told = "\n".join((_reason(error), *_log(Path(folder))))
                raise BackendError(f"graph {graph.tag} cannot be compiled: {told}") from error
        return neff

    def assemble(self, graphs: Mapping[str, Compiled[NxdGraph]]) -> NxdProgram:
        """See `Builder.assemble`."""
        from neuronx_distributed import NxDModel
        from neuronx_distributed.trace.model_builder_utils import CompilationArtifacts

        model = NxDModel(world_size=self._ranks)
        with tempfile.TemporaryDirectory(prefix="lmi-multi-neuron-") as folder:
            for tag, compiled in graphs.items():
                neff = Path(folder) / f"{tag}.neff"
                neff.write_bytes(compiled.binary)
                try:
                    model.add(
                        tag, compiled.graph.artifacts, CompilationArtifacts(neff_filepath=str(neff))
                    )
                except Exception as error:  # the library's, or the Neuron runtime's
                    raise BackendError(f"graph {tag} cannot be loaded: {_reason(error)}") from error
                neff.unlink()
        return NxdProgram(model, self._start, self._ranks)

    def _world(self) -> AbstractContextManager[Any]:
        from neuronx_distributed import NxDParallelState

        state: AbstractContextManager[Any] = NxDParallelState(
            world_size=self._ranks, tensor_model_parallel_size=self._ranks
        )
        return state


class NxdProgram:
    """`program.Program` over an NxDModel, which drives all cores from this process."""

    def __init__(self, model: Any, state: Mapping[str, Tensor], ranks: int) -> None:
        self._model, self._state, self._ranks = model, state, ranks

    def load_weights(self, shards: Sequence[Mapping[str, Tensor]]) -> None:
        """See `Program.load_weights`. The state starts as zeros."""
        self._model.set_weights([{n: t.contiguous() for n, t in s.items()} for s in shards])
        self._model.to_neuron()

    def run(self, tag: str, **inputs: Tensor) -> list[Tensor]:
        """See `Program.run`."""
        with torch.inference_mode():
            outputs = self._model(model_name=tag, **inputs)
        return [output.cpu() for output in outputs]

    def reset_state(self) -> None:
        """See `Program.reset_state`."""
        for name, like in self._state.items():
            for rank in range(self._ranks):
                self._model.write_to_neuron_buffer(torch.zeros_like(like), name, rank)

    def close(self) -> None:
        """See `Program.close`. The cores stay this process's until it ends."""
        self.__dict__.pop("_model", None)


def _reason(error: BaseException) -> str:
    """What went wrong first: the library wraps one exception in another."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _log(folder: Path) -> list[str]:
    """The end of the compiler's log."""
    lines: list[str] = []
    for path in folder.rglob("log-neuron-cc.txt"):
        lines += path.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-LOG_LINES:]
