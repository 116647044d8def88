"""What the `nxd` runtime calls, against neuronx-distributed's signatures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lmi_multi.backends.neuron import environment, nxd
from lmi_multi.backends.neuron.devices import Core, Host
from lmi_multi.backends.neuron.program import Compiled, Trace
from torch import Tensor, nn

from lmi_multi.errors import BackendError
from lmi_multi.instances import find
from tests.neuron_libraries import Library

TRACE = Trace("decode", {"token_ids": (2,)})
TRACED = [
    "trace.parallel_context.NxDParallelState.__init__",
    "trace.parallel_context.NxDParallelState.__enter__",
    "trace.functions.trace",
    "trace.parallel_context.NxDParallelState.__exit__",
]
ADDED = "trace.nxd_model.nxd_model.NxDModel."
HLO = """HloModule graph
ENTRY %graph (p0: s64[2], p1: f32[2], p2: f32[3]) -> (s64[2], f32[3]) {
  %p0 = s64[2]{0} parameter(0)
  %p1 = f32[2]{0} parameter(1)
  %p2 = f32[3]{0} parameter(2)
  ROOT %t = (s64[2]{0}, f32[3]{0}) tuple(s64[2]{0} %p0, f32[3]{0} %p2)
}
"""


class Module(nn.Module):
    """A weight, and a state that is rebound."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.zeros(2))
        self.register_buffer("k0", torch.zeros(3))


def traced(model: nn.Module, hlo: str = HLO, **options: Any) -> SimpleNamespace:
    """As the real one, it leaves the module with the state that the trace made."""
    model.k0 = model.k0 + 1
    tensors = [("", "token_ids", [2], 0), ("w", "", [2], 1), ("k0", "", [3], 1)]
    inputs = [
        SimpleNamespace(
            checkpoint_key=key.encode(), user_input_key=name.encode(), shape=shape, data_type=dtype
        )
        for key, name, shape, dtype in tensors
    ]
    outputs = [SimpleNamespace(shape=(3,), data_type=1), SimpleNamespace(shape=(2,), data_type=0)]
    aliases = {0: 2}  # a state may come first
    meta = SimpleNamespace(input_tensors=inputs, output_tensors=outputs, output_aliases_to=aliases)
    proto = SimpleNamespace(
        SerializeToString=lambda: hlo.encode(),
        computations=[SimpleNamespace(instructions=[1, 2, 3, 4])],
    )
    return SimpleNamespace(hlo=proto, metaneff=meta)


def compiled(hlo: Any, metaneff: Any, compiler_workdir: str, **options: Any) -> SimpleNamespace:
    return SimpleNamespace(get_neff_bytes=lambda: b"NEFF of " + options["key"].encode())


def neff(self: Any, key: str, trace_artifacts: Any, compilation_artifacts: Any) -> None:
    path = Path(compilation_artifacts.neff_filepath)
    self.neffs = {**getattr(self, "neffs", {}), key: path.read_bytes()}


RANKS = [0]
"""The rank that the tracer believes to be, last."""


@contextmanager
def as_rank(rank: int) -> Iterator[None]:
    RANKS.append(rank)
    yield
    RANKS.pop()


BEHAVIOURS: dict[str, Callable[..., Any]] = {
    "trace.functions.trace": traced,
    "trace.functions.compile": compiled,
    "trace.model_builder_utils.CompilationArtifacts.__init__": lambda self, neff_filepath: setattr(
        self, "neff_filepath", neff_filepath
    ),
    f"{ADDED}add": neff,
    f"{ADDED}forward": lambda self, **given: (given["token_ids"] + 1,),
}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library("neuronx_distributed", dict(BEHAVIOURS))
    found.install(monkeypatch)
    monkeypatch.setattr(nxd, "hlo_text", bytes.decode)
    monkeypatch.setattr(nxd, "as_rank", as_rank)
    without_neuron(monkeypatch)
    return found


def without_neuron(monkeypatch: pytest.MonkeyPatch, **given: str) -> None:
    """An environment of the test's own, with no variables of Neuron but `given`."""
    kept = {name: value for name, value in os.environ.items() if "NEURON" not in name}
    monkeypatch.setattr(os, "environ", kept | given)


def builder(module: nn.Module, ranks: int = 2) -> nxd.NxdBuilder:
    return nxd.NxdRuntime(find("inf2.24xlarge")).builder(module, ["k0"], ranks)


def test_every_call_binds_from_lowering_to_closing(library: Library) -> None:
    module = Module()
    start = module.k0
    made = builder(module)
    graph = made.lower(TRACE)
    assert module.k0 is start
    assert graph.instructions == 4
    assert len(graph.digest) == 64
    binary = made.compile(graph)
    assert binary == b"NEFF of decode"
    program = made.assemble({"decode": Compiled(graph, binary)})
    shards = [{"w": torch.ones(2)}, {"w": torch.zeros(2)}]
    program.load_weights(shards)
    [output] = program.run("decode", token_ids=torch.tensor([4, 5]))
    assert output.tolist() == [5, 6]
    program.reset_state()
    program.close()
    program.close()
    assert library.names() == [
        *TRACED,  # as the first rank
        *TRACED,  # and as the last
        "trace.functions.compile",
        f"{ADDED}__init__",
        "trace.model_builder_utils.CompilationArtifacts.__init__",
        f"{ADDED}add",
        f"{ADDED}set_weights",
        f"{ADDED}to_neuron",
        f"{ADDED}forward",
        f"{ADDED}write_to_neuron_buffer",
        f"{ADDED}write_to_neuron_buffer",
    ]
    given = {call.name.rpartition(".")[2]: call.arguments for call in library.calls}
    world = library.calls[0].arguments
    assert (world["world_size"], world["tensor_model_parallel_size"]) == (2, 2)
    assert given["trace"]["kwargs"]["token_ids"].shape == (2,)
    assert given["compile"]["compiler_args"] == f"{environment.COMPILER_FLAGS} --target=inf2"
    assert [{**shard} for shard in given["set_weights"]["sharded_checkpoint"]] == shards
    assert given["forward"]["model_name"] == "decode"
    written = [c.arguments for c in library.calls if c.name.endswith("write_to_neuron_buffer")]
    assert [(a["buffer_key"], a["rank"]) for a in written] == [("k0", 0), ("k0", 1)]
    assert not any(a["tensor"].any() for a in written)
    assert {n: v for n, v in os.environ.items() if "NEURON" in n} == {
        "NEURON_PLATFORM_TARGET_OVERRIDE": "inf2",
        "NEURON_CC_FLAGS": environment.COMPILER_FLAGS,
        "NEURON_COMPILE_CACHE_URL": environment.cache_url(),
    }


def test_a_call_that_the_library_does_not_have_fails(library: Library) -> None:
    from neuronx_distributed import NxDModel

    with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
        NxDModel(2, ranks=2)
    with pytest.raises(TypeError, match="missing a required argument: 'rank'"):
        NxDModel(world_size=2).write_to_neuron_buffer(torch.zeros(1), "k0")


def fails(*causes: Exception) -> Callable[..., Any]:
    def behaviour(*args: Any, compiler_workdir: str | None = None, **kwargs: Any) -> None:
        if compiler_workdir:
            log = Path(compiler_workdir) / "decode" / "now" / "log-neuron-cc.txt"
            log.parent.mkdir(parents=True)
            log.write_text("first\n" * 30 + "[NCC_EVRF001] operator sort is not supported\n")
        raise causes[0] from causes[1]

    return behaviour


def test_faults_name_the_graph_and_what_was_said_first(library: Library) -> None:
    wrapped = fails(RuntimeError("Compilation failed for decode"), ValueError("exit code 70"))
    made = builder(Module())
    graph = made.lower(TRACE)
    library.behaviours |= {"trace.functions.compile": wrapped, f"{ADDED}add": wrapped}
    with pytest.raises(BackendError) as error:
        made.compile(graph)
    told = str(error.value).splitlines()
    assert told[0] == "graph decode cannot be compiled: ValueError: exit code 70"
    assert told[-1] == "[NCC_EVRF001] operator sort is not supported"
    assert len(told) == 1 + nxd.LOG_LINES
    with pytest.raises(BackendError, match="graph decode cannot be loaded: ValueError: exit code"):
        made.assemble({"decode": Compiled(graph, b"")})
    library.behaviours["trace.functions.trace"] = wrapped
    with pytest.raises(BackendError, match="graph decode cannot be lowered: ValueError: exit"):
        made.lower(TRACE)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (("tuple(", "sort("), "graph decode cannot run: t: sort"),
        (("f32[3]", "f64[3]"), "graph decode cannot run: .*64-bit floats"),
    ],
)
def test_graphs_are_linted(library: Library, change: tuple[str, str], fault: str) -> None:
    hlo = HLO.replace(*change)
    library.behaviours["trace.functions.trace"] = lambda m, **o: traced(m, hlo, **o)
    with pytest.raises(BackendError, match=fault):
        builder(Module()).lower(TRACE)


def test_a_graph_that_differs_from_rank_to_rank_is_refused(library: Library) -> None:
    def own(model: nn.Module, **options: Any) -> SimpleNamespace:
        return traced(model, HLO.replace("parameter(1)", f"parameter({RANKS[-1] + 1})"))

    library.behaviours["trace.functions.trace"] = own
    assert builder(Module(), 1).lower(TRACE).instructions == 4
    with pytest.raises(BackendError, match="graph decode cannot run: ranks trace "):
        builder(Module(), 2).lower(TRACE)


def forgotten(meta: Any) -> None:
    meta.output_aliases_to = {}


def another(meta: Any) -> None:
    meta.output_aliases_to = {1: 2}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (forgotten, "state k0 does not come back"),
        (another, r"state k0 comes in as \[3\] and goes out as \[2\]"),
    ],
)
def test_state_that_does_not_come_back_is_a_fault(
    library: Library, change: Callable[[Any], None], fault: str
) -> None:
    def changed(model: nn.Module, **options: Any) -> SimpleNamespace:
        found = traced(model)
        change(found.metaneff)
        return found

    library.behaviours["trace.functions.trace"] = changed
    with pytest.raises(BackendError, match=f"graph decode cannot run: {fault}"):
        builder(Module()).lower(TRACE)


def here(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    cores = [Core(i, i // 2, 1, None if i < free else 7) for i in range(4)]
    host = Host(("/dev/neuron0", "/dev/neuron1"), "inf2.xlarge", cores)
    monkeypatch.setattr(environment.devices, "look", lambda: host)
    monkeypatch.setattr(environment.devices, "instance_type", lambda: host.instance)


def test_cores_are_taken_before_the_library_is_used(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch, free=2)
    runtime = nxd.NxdRuntime()
    runtime.builder(Module(), ["k0"], 2)
    assert os.environ["NEURON_RT_VISIBLE_CORES"] == "0-1"
    assert os.environ["NEURON_RT_NUM_CORES"] == "2"
    assert not library.calls
    assert runtime.toolchain.flags.endswith("--target=inf2")
    without_neuron(monkeypatch)
    with pytest.raises(BackendError, match=r"4 NeuronCores are wanted, 2 of 4 are free.*process 7"):
        runtime.builder(Module(), ["k0"], 4)


def test_cores_that_the_user_names_are_used(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_neuron(monkeypatch, NEURON_RT_VISIBLE_CORES="2,4-6")
    nxd.NxdRuntime().builder(Module(), ["k0"], 4)
    with pytest.raises(BackendError, match="is '2,4-6', but tensor_parallel is 8"):
        nxd.NxdRuntime().builder(Module(), ["k0"], 8)
    without_neuron(monkeypatch, NEURON_RT_VISIBLE_CORES="all")
    with pytest.raises(BackendError, match="is 'all', must be numbers and ranges"):
        nxd.NxdRuntime().builder(Module(), ["k0"], 1)


def test_compiling_for_two_kinds_of_hardware_is_refused(library: Library) -> None:
    builder(Module())
    with pytest.raises(BackendError, match="OVERRIDE is 'inf2', but this model runs on 'trn1'"):
        nxd.NxdRuntime(find("trn1.32xlarge")).builder(Module(), ["k0"], 2)


def test_outputs_are_tensors(library: Library) -> None:
    made = builder(Module())
    program = made.assemble({})
    library.behaviours[f"{ADDED}forward"] = lambda self, **given: [given["token_ids"]] * 2
    outputs = program.run("decode", token_ids=torch.tensor([1]))
    assert [type(output) for output in outputs] == [Tensor, Tensor]
