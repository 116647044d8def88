"""Runs graphs without NeuronCores: jaxlib's CPU client executes the very HLO as N replicas.

What this shows is that the graphs, their collectives and their state are right. It shows nothing
about the hardware, its compiler or its speed.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmi_multi.errors import BackendError

from .lower import Graph, Lowering
from .program import Compiled, Toolchain, Trace

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


def _processor() -> str:
    """The processor's kind: a hash of the instruction sets that it tells, where it tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    told = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


class EmulatorRuntime:
    """`program.Runtime` on a CPU."""

    device = "emulated NeuronCores"
    lazy = True  # most of many buckets are never met in a test

    @property
    def toolchain(self) -> Toolchain:
        """See `Runtime.toolchain`. Machine code is only for processors of its kind."""
        packages = ("torch", "torch-xla", "jaxlib")
        versions = {name: version(name) for name in packages} | {"processor": _processor()}
        return Toolchain("emulator", versions)

    def builder(self, module: nn.Module, state: Sequence[str], ranks: int) -> EmulatorBuilder:
        """See `Runtime.builder`."""
        devices = _devices()
        if ranks > len(devices):
            raise BackendError(
                f"{ranks} cores are wanted, the emulator has {len(devices)}; set "
                f"XLA_FLAGS={_COUNT}={ranks} before the process starts"
            )
        return EmulatorBuilder(module, state, devices[:ranks])


class EmulatorBuilder:
    """`program.Builder` over torch-xla, which lowers, and jaxlib, which compiles."""

    def __init__(self, module: nn.Module, state: Sequence[str], devices: Sequence[Any]) -> None:
        self._devices, self._ranks = devices, len(devices)
        self._empty = {name: module.get_buffer(name) for name in state}
        self._lowering = Lowering(module, state, self._ranks)

    def lower(self, trace: Trace) -> Graph:
        """See `Builder.lower`."""
        return self._lowering.lower(trace)

    def compile(self, graph: Graph) -> bytes:
        """See `Builder.compile`. The bytes are XLA's own form of an executable."""
        from jax._src.lib import xla_client
        from jaxlib import _jax

        options = xla_client.CompileOptions()
        options.num_replicas, options.num_partitions = self._ranks, 1
        options.device_assignment = xla_client.DeviceAssignment.create(
            np.arange(self._ranks).reshape(self._ranks, 1)
        )
        try:
            computation = xla_client.XlaComputation(graph.proto)
            module = _jax.mlir.xla_computation_to_mlir_module(computation)
            executable = self._client.compile_and_load(module, self._places, options)
            binary: bytes = executable.serialize()
            return binary
        except Exception as error:  # jaxlib's own
            raise BackendError(f"graph {graph.tag} cannot be compiled: {error}") from error

    def load(self, tag: str, binary: bytes) -> Any:
        """What `compile` made, ready to be run. Raises BackendError that names the graph."""
        try:
            return self._client.deserialize_executable(binary, self._places)
        except Exception as error:  # jaxlib's own
            raise BackendError(f"graph {tag} cannot be loaded: {error}") from error

    def assemble(self, graphs: Mapping[str, Compiled[Graph]]) -> EmulatorProgram:
        """See `Builder.assemble`."""
        return EmulatorProgram(self, graphs, self._devices, self._empty)

    @property
    def _client(self) -> Any:
        return self._devices[0].client

    @property
    def _places(self) -> Any:
        from jax._src.lib import xla_client

        return xla_client.DeviceList(tuple(self._devices))


class EmulatorProgram:
    """`program.Program` over jaxlib's replicas."""

    def __init__(
        self,
        builder: EmulatorBuilder,
        graphs: Mapping[str, Compiled[Graph]],
        devices: Sequence[Any],
        empty: Mapping[str, Tensor],
    ) -> None:
        self._builder, self._graphs, self._devices, self._empty = builder, graphs, devices, empty
        self._ranks = len(devices)
        self._loaded: dict[str, Any] = {}
        self._held: dict[str, Any] = {}

    def load_weights(self, shards: Sequence[Mapping[str, Tensor]]) -> None:
        """See `Program.load_weights`."""
        for name in shards[0]:
            self._held[name] = self._place([shard[name] for shard in shards])
        self.reset_state()

    def run(self, tag: str, **inputs: Tensor) -> list[Tensor]:
        """See `Program.run`."""
        compiled = self._graphs[tag]
        if tag not in self._loaded:
            self._loaded[tag] = self._builder.load(tag, compiled.binary)
        graph = compiled.graph
        given = {f"input.{name}": self._place([x] * self._ranks) for name, x in inputs.items()}
        known = self._held | given
        constants = {i: self._place([x] * self._ranks) for i, x in graph.constants.items()}
        arguments = [constants.get(i, known.get(name)) for i, name in enumerate(graph.parameters)]
        results = self._loaded[tag].execute_sharded(arguments)
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
        self._loaded.clear()

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
