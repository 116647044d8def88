"""Stand-ins for what neuronx-distributed imports and is not public: with them it runs on a CPU.

Closed are torch-neuronx, libneuronxla (which calls the compiler) and the kernels' packages. Here a
graph is lowered by torch-xla, "compiled" by jaxlib and run as replicas on its CPU devices. How the
closed parts find a graph's state, name its inputs and number them is guessed from what the public
sources do with the result. So what passes shows that calls, names, order and graphs fit together;
it shows nothing of the compiler or the hardware.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar
from unittest import mock
from weakref import WeakKeyDictionary

import torch
from lmi_multi.backends.neuron import lint
from lmi_multi.backends.neuron.emulator import EmulatorRuntime, _tensor
from lmi_multi.backends.neuron.lower import Graph, hlo_text
from lmi_multi.backends.neuron.program import Compiled
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CLOSED = ("torch_neuronx", "libneuronxla", "neuronxcc", "nki", "nkilib", "neuronxlogger")
FLAGS: list[str] = []
"""The flags of every call of the "compiler"."""


class Kind(IntEnum):
    """MetaTensor.Type."""

    USER_INPUT = 0
    INPUT_WEIGHT = 1
    INPUT_STATE = 2
    OUTPUT = 3
    INPUT_CONSTANT = 4


@dataclass
class MetaTensor:
    """One input or output of a graph."""

    shape: list[int]
    data_type: torch.dtype
    type: Kind
    checkpoint_key: bytes = b""
    user_input_key: bytes = b""
    value: bytes = b""
    Type = Kind


class _Message:
    """As much of a protocol buffer as is used."""

    def SerializeToString(self) -> bytes:  # noqa: N802
        return pickle.dumps(self.__dict__)

    def ParseFromString(self, data: bytes) -> None:  # noqa: N802
        self.__dict__.update(pickle.loads(data))


@dataclass
class MetaNeff(_Message):
    input_tensors: list[MetaTensor] = field(default_factory=list)
    output_tensors: list[MetaTensor] = field(default_factory=list)
    output_aliases_to: dict[int, int] = field(default_factory=dict)
    serialized_graph_def: bytes = b""


@dataclass(frozen=True)
class Instruction:
    id: str
    opcode: str
    operand_ids: tuple[str, ...]
    called_computation_ids: tuple[str, ...] = ()


class HloModuleProto(_Message):
    """HLO as bytes; its instructions are read from its text."""

    entry_computation_id = 0

    def __init__(self, proto: bytes = b"") -> None:
        self.ParseFromString(proto)

    def SerializeToString(self) -> bytes:  # noqa: N802
        return self._proto

    def ParseFromString(self, data: bytes) -> None:  # noqa: N802
        self._proto = data

    @property
    def computations(self) -> list[SimpleNamespace]:
        found = lint.instructions(hlo_text(self._proto))
        listed = [Instruction(i.name, i.opcode, tuple(i.operands)) for i in found if i.entry]
        return [SimpleNamespace(id=0, instructions=listed)]


class Flattener(nn.Module):
    """Picks the graph's inputs from those that were given."""

    def __init__(self, layout: Sequence[int], exclude: Sequence[int] | None = None) -> None:
        super().__init__()
        self.layout, self.exclude = layout, exclude

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [x for i, x in enumerate(inputs) if i not in (self.exclude or ())]


class Packer(nn.Module):
    """Gives the outputs the form that the traced function returned."""

    def __init__(self, skipped: int) -> None:
        super().__init__()
        self._skipped = skipped

    def forward(self, outputs: list[Tensor]) -> list[Tensor]:
        return outputs[self._skipped :]


_ON_DEVICE: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def generate_hlo(func: nn.Module, inputs: Mapping[str, Tensor], **options: Any) -> SimpleNamespace:
    """Lower `func`. A buffer that it rebinds is state.

    The inputs are outputs too: that alone makes torch-xla number them first and in their order.
    """
    import copy

    import torch_xla

    device = torch_xla.device()
    if func not in _ON_DEVICE:
        _ON_DEVICE[func] = copy.deepcopy(func).to(device)
    module = _ON_DEVICE[func]
    start = dict(module.named_buffers())
    placed = {name: x.to(device) for name, x in inputs.items()}
    torch_xla.sync()
    with torch.no_grad():
        outputs = [*placed.values(), *module(**placed)]
    now = dict(module.named_buffers())
    state = [name for name in start if now[name] is not start[name]]
    context = torch_xla._XLAC.lowering.LoweringContext()
    context.build([*outputs, *(now[name] for name in state)])
    for name in state:
        setattr(module, name, start[name])
    meta = _meta(context, placed, start, outputs, state)
    meta.serialized_graph_def = context.hlo()
    return SimpleNamespace(
        hlo_module=HloModuleProto(context.hlo()),
        metaneff=meta,
        flattener=Flattener(tuple(range(len(placed)))),
        packer=Packer(len(placed)),
        weight_name_to_idx={
            t.checkpoint_key.decode(): i
            for i, t in enumerate(meta.input_tensors)
            if t.type is Kind.INPUT_WEIGHT
        },
    )


def _meta(
    context: Any,
    inputs: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    outputs: Sequence[Tensor],
    state: Sequence[str],
) -> MetaNeff:
    given = context.parameter_id_tensor_mapping()
    names = {context.tensor_parameter_id(tensor): name for name, tensor in buffers.items()}
    asked = {context.tensor_parameter_id(tensor) for tensor in inputs.values()}
    meta, places = MetaNeff(), {}
    for i in range(len(given)):
        tensor, name = given[i], names.get(i)
        made = MetaTensor(list(tensor.shape), tensor.dtype, Kind.INPUT_CONSTANT)
        if i in asked:
            made.type = Kind.USER_INPUT
        elif name is not None:
            made.type = Kind.INPUT_STATE if name in state else Kind.INPUT_WEIGHT
            made.checkpoint_key = name.encode()
            places[name] = i
        else:
            made.value = pickle.dumps(tensor.cpu())
        meta.input_tensors.append(made)
    for tensor in [*outputs, *(buffers[name] for name in state)]:
        meta.output_tensors.append(MetaTensor(list(tensor.shape), tensor.dtype, Kind.OUTPUT))
    for i, name in enumerate(state):
        meta.output_aliases_to[len(outputs) + i] = places[name]
    return meta


def neuron_xla_compile(module_bytes: bytes, compiler_flags: str, **options: Any) -> bytes:
    """Compile later: how many cores there are is not told here."""
    FLAGS.append(compiler_flags)
    return b"NEFF" + module_bytes


class SPMDModel:
    """Runs one graph on all cores. The state is in host memory, in and out of each run."""

    def __init__(self, neff: bytes, metaneff: bytes, local_ranks: int, world: int) -> None:
        self._meta = MetaNeff()
        self._meta.ParseFromString(metaneff)
        self._neff, self._metaneff = neff, metaneff
        self._graph = _graph(neff[len(b"NEFF") :], self._meta)
        builder = EmulatorRuntime().builder(nn.Module(), [], world)
        compiled = Compiled(self._graph, builder.compile(self._graph))
        self._program = builder.assemble({"graph": compiled})

    def initialize(
        self, states: list[dict[str, Tensor]], weights: list[dict[str, Tensor]], start: int
    ) -> None:
        self._states = states
        self._program.load_weights(weights)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        program, held = self._program, self._program._held
        names = [
            t.user_input_key.decode() for t in self._meta.input_tensors if t.type is Kind.USER_INPUT
        ]
        for name in self._graph.state:
            held[name] = program._place([rank[name] for rank in self._states])
        outputs = program.run("graph", **dict(zip(names, inputs, strict=True)))
        for name in self._graph.state:
            for rank, part in zip(self._states, held[name].addressable_shards, strict=True):
                rank[name].copy_(_tensor(part.data))
        return outputs

    def save_neff(self, path: str) -> bool:
        Path(path).write_bytes(self._neff)
        return True

    def save_metaneff(self, path: str) -> bool:
        Path(path).write_bytes(self._metaneff)
        return True


def _graph(proto: bytes, meta: MetaNeff) -> Graph:
    """As the emulator wants to see it."""
    names = [
        (t.checkpoint_key or b"input." + t.user_input_key).decode() for t in meta.input_tensors
    ]
    aliases = meta.output_aliases_to
    return Graph(
        tag="graph",
        proto=proto,
        text="",
        parameters=names,
        constants={i: pickle.loads(t.value) for i, t in enumerate(meta.input_tensors) if t.value},
        outputs=len(meta.output_tensors) - len(aliases),
        state=[names[aliases[output]] for output in sorted(aliases)],
    )


class _HostMemory(TorchFunctionMode):
    """Tensors for the cores' device are made on the host."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # the name is torch's
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("privateuseone"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class _Anything(ModuleType):
    """A module of which every attribute exists and nothing is ever called."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = mock.MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] in CLOSED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _module(name: str, **content: Any) -> None:
    module = importlib.import_module(name)
    for key, value in content.items():
        setattr(module, key, value)


def install_finder(sources: Path) -> None:
    """Let this process import a library from `sources`, and anything from closed packages."""
    sys.meta_path.insert(0, _Finder())
    sys.path.insert(0, str(sources))


def install(sources: Path) -> None:
    """Let this process import neuronx-distributed from `sources`, the `src` of a checkout."""
    import torch_xla  # noqa: F401  # before what stands in for things that import it

    install_finder(sources)

    def platform(*given: Any) -> str:
        return "inf2"

    # Of the training part, and gone from transformers 5.
    sys.modules["transformers.utils.fx"] = ModuleType("transformers.utils.fx")
    _module("transformers.utils.fx", HFTracer=torch.fx.Tracer)
    _module("torch_neuronx", __version__="2.9.0+stand.in")
    _module("torch_neuronx.contexts", disable_nrt_load=contextlib.nullcontext)
    _module(
        "torch_neuronx.proto",
        metaneff_pb2=SimpleNamespace(MetaNeff=MetaNeff, MetaTensor=MetaTensor),
    )
    _module(
        "torch_neuronx.pyhlo",
        hlo_pb2=SimpleNamespace(
            HloModuleProto=HloModuleProto, HloComputationProto=object, HloInstructionProto=object
        ),
    )
    _module("torch_neuronx.utils", get_platform_target=platform)
    _module("torch_neuronx.utils.utils", get_platform_target=platform, SUPPORTED_TYPES=["inf2"])
    _module("torch_neuronx.xla_impl.structure", Flattener=Flattener, Packer=Packer)
    _module("torch_neuronx.xla_impl", structure=sys.modules["torch_neuronx.xla_impl.structure"])
    _module(
        "torch_neuronx.xla_impl.trace",
        generate_hlo=generate_hlo,
        get_torch_dtype=lambda dtype: dtype,
        HloArtifacts=SimpleNamespace,
        XLA_DTYPE_TO_METANEFF_DTYPE={},
    )
    _module("libneuronxla", neuron_xla_compile=neuron_xla_compile)
    torch.classes.neuron = SimpleNamespace(SPMDModel=SPMDModel, LayoutTransformation=object)
    torch.ops.neuron = SimpleNamespace(_parallel_load=lambda shards: [dict(s) for s in shards])
    _HostMemory().__enter__()
