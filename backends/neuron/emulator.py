"""Runs graphs without NeuronCores: jaxlib's CPU client executes the very HLO as N replicas.

What this shows is that the graphs, their collectives and their state are right. It shows nothing
about the hardware, its compiler or its speed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmi_multi.errors import BackendError

from .lint import check, check_inputs
from .lower import Graph, Lowering
from .program import Trace

DEVICES = 8
_COUNT = "--xla_force_host_platform_device_count"


@cache
def _devices() -> list[Any]:
    """jaxlib's CPU devices. Their number is fixed when jax starts."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _COUNT not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_COUNT}={DEVICES}".strip()
    import jax

    jax.config.update("jax_enable_x64", True)  # token ids are int64
    return list(jax.devices("cpu"))


class EmulatorRuntime:
    """`program.Runtime` on a CPU."""

    name = "emulator"

    def compile(
        self, module: nn.Module, state: Sequence[str], traces: Sequence[Trace], ranks: int
    ) -> EmulatorProgram:
        """See `Runtime.compile`. A graph is lowered, linted and compiled when it is first run:
        most of many buckets are never met in a test."""
        return EmulatorProgram(module, state, traces, ranks)


class EmulatorProgram:
    """`program.Program` over jaxlib's replicas."""

    def __init__(
        self, module: nn.Module, state: Sequence[str], traces: Sequence[Trace], ranks: int
    ) -> None:
        devices = _devices()
        if ranks > len(devices):
            raise BackendError(
                f"{ranks} cores are wanted, the emulator has {len(devices)}; set "
                f"XLA_FLAGS={_COUNT}={ranks} before the process starts"
            )
        self._ranks, self._devices = ranks, devices[:ranks]
        self._traces = {trace.tag: trace for trace in traces}
        self._empty = {name: module.get_buffer(name) for name in state}
        self._lowering = Lowering(module, state, ranks)
        self._graphs: dict[str, tuple[Graph, Any]] = {}
        self._held: dict[str, Any] = {}

    def load_weights(self, shards: Sequence[Mapping[str, Tensor]]) -> None:
        """See `Program.load_weights`."""
        for name in shards[0]:
            self._held[name] = self._place([shard[name] for shard in shards])
        self.reset_state()

    def run(self, tag: str, **inputs: Tensor) -> list[Tensor]:
        """See `Program.run`."""
        graph, executable = self._graph(tag)
        check_inputs(tag, self._traces[tag].bounds, inputs)
        given = {f"input.{name}": self._place([x] * self._ranks) for name, x in inputs.items()}
        known = self._held | given
        constants = {i: self._place([x] * self._ranks) for i, x in graph.constants.items()}
        arguments = [constants.get(i, known.get(name)) for i, name in enumerate(graph.parameters)]
        results = executable.execute_sharded(arguments)
        parts = results.disassemble_into_single_device_arrays()
        for name, part in zip(graph.state, parts[graph.outputs :], strict=True):
            self._held[name] = self._join(part)
        return [_tensor(part[0]) for part in parts[: graph.outputs]]

    def reset_state(self) -> None:
        """See `Program.reset_state`."""
        for name, like in self._empty.items():
            self._held[name] = self._place([torch.zeros_like(like)] * self._ranks)

    def close(self) -> None:
        """See `Program.close`."""
        self._held.clear()
        self._graphs.clear()

    def graph(self, tag: str) -> Graph:
        """The graph, lowered and linted."""
        return self._graph(tag)[0]

    def _graph(self, tag: str) -> tuple[Graph, Any]:
        if tag not in self._graphs:
            graph = self._lowering.lower(self._traces[tag])
            check(graph, self._ranks)
            self._graphs[tag] = (graph, self._compile(graph))
        return self._graphs[tag]

    def _compile(self, graph: Graph) -> Any:
        from jax._src.lib import xla_client
        from jaxlib import _jax

        computation = xla_client.XlaComputation(graph.proto)
        options = xla_client.CompileOptions()
        options.num_replicas, options.num_partitions = self._ranks, 1
        options.device_assignment = xla_client.DeviceAssignment.create(
            np.arange(self._ranks).reshape(self._ranks, 1)
        )
        try:
            module = _jax.mlir.xla_computation_to_mlir_module(computation)
            client = self._devices[0].client
            return client.compile_and_load(
                module, xla_client.DeviceList(tuple(self._devices)), options
            )
        except Exception as error:  # jaxlib's own
            raise BackendError(f"graph {graph.tag} cannot be compiled: {error}") from error

    def _place(self, parts: Sequence[Tensor]) -> Any:
        """One tensor a replica, put on its device."""
        import jax

        pairs = zip(parts, self._devices, strict=True)
        return self._join([jax.device_put(_array(part), device) for part, device in pairs])

    def _join(self, parts: Sequence[Any]) -> Any:
        """What jax's interface wants: one array of which each replica holds a part."""
        import jax

        mesh = jax.sharding.Mesh(np.array(self._devices), ("rank",))
        shape = tuple(parts[0].shape)
        spec = jax.sharding.PartitionSpec("rank") if shape else jax.sharding.PartitionSpec()
        whole = (shape[0] * self._ranks, *shape[1:]) if shape else ()
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.make_array_from_single_device_arrays(whole, sharding, list(parts))


def _array(tensor: Tensor) -> Any:
    """numpy has no bfloat16; ml_dtypes, which comes with jax, has."""
    if tensor.dtype != torch.bfloat16:
        return tensor.detach().contiguous().numpy()
    import ml_dtypes

    return tensor.detach().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))
