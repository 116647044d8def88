"""The `nxd` runtime with graphs that run: its library's signatures over stand-ins that compute.

The library here is only its signatures; below them a CPU traces, compiles and runs every graph as
replicas. `make test-neuron-sources` runs the same on the library's own sources.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from lmi_multi.backends.neuron.loading import open_executor
from lmi_multi.backends.neuron.nxd import NxdRuntime
from torch import Tensor, nn

from lmi_multi.instances import find
from lmi_multi.model import Model
from tests.neuron_libraries import Library
from tests.neuron_models import LIMITS, artifact, ids, on_cpu
from tests.test_neuron_nxd import ADDED

pytest.importorskip("torch_xla", reason="the emulator needs torch-xla: see `make test-neuron`")
pytest.importorskip("jaxlib", reason="the emulator needs jaxlib: see `make test-neuron`")

from tests import nxd_closed_parts as closed  # it needs torch-xla

OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "_sampled": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3},
    "_beams": {"num_beams": 4, "num_return_sequences": 2},
}
"""By how the tags of the graphs end that carry them."""
SIZES: dict[str, Any] = {"max_new_tokens": 32, "ignore_eos": True}


class Cores:
    """What the library's classes do, as far as the runtime asks."""

    @staticmethod
    def world(self: Any, **sizes: int) -> None:
        self.patch = mock.patch("torch_xla.runtime.world_size", return_value=sizes["world_size"])

    @staticmethod
    def trace(model: nn.Module, kwargs: dict[str, Tensor], **options: Any) -> SimpleNamespace:
        made = closed.generate_hlo(model, kwargs)
        for name, tensor in zip(kwargs, made.metaneff.input_tensors, strict=False):
            tensor.user_input_key = name.encode()
        return SimpleNamespace(hlo=made.hlo_module, metaneff=made.metaneff, packer=made.packer)

    @staticmethod
    def compile(hlo: Any, metaneff: Any, **options: Any) -> SimpleNamespace:
        neff = closed.neuron_xla_compile(hlo.SerializeToString(), options["compiler_args"])
        return SimpleNamespace(get_neff_bytes=lambda: neff)

    @staticmethod
    def model(self: Any, world_size: int) -> None:
        self.world_size, self.graphs = world_size, {}

    @staticmethod
    def add(self: Any, key: str, traced: Any, compiled: Any) -> None:
        neff, meta = Path(compiled.neff_filepath).read_bytes(), traced.metaneff
        graph = closed.SPMDModel(neff, meta.SerializeToString(), self.world_size, self.world_size)
        self.graphs[key] = graph, traced.packer
        self.states = [
            {
                t.checkpoint_key.decode(): torch.zeros(t.shape, dtype=t.data_type)
                for t in meta.input_tensors
                if t.type is closed.Kind.INPUT_STATE
            }
            for _ in range(self.world_size)
        ]

    @staticmethod
    def to_neuron(self: Any) -> None:
        for graph, _ in self.graphs.values():
            graph.initialize(self.states, self.weights, 0)

    @staticmethod
    def forward(self: Any, model_name: str, **inputs: Tensor) -> list[Tensor]:
        graph, packer = self.graphs[model_name]
        return packer(graph.forward(list(inputs.values())))

    @staticmethod
    def write(self: Any, tensor: Tensor, name: str, rank: int) -> None:
        self.states[rank][name].copy_(tensor)


BEHAVIOURS = {
    "trace.parallel_context.NxDParallelState.__init__": Cores.world,
    "trace.parallel_context.NxDParallelState.__enter__": lambda self: self.patch.start(),
    "trace.parallel_context.NxDParallelState.__exit__": lambda self, *error: self.patch.stop(),
    "trace.functions.trace": Cores.trace,
    "trace.functions.compile": Cores.compile,
    "trace.model_builder_utils.CompilationArtifacts.__init__": lambda self, neff_filepath: setattr(
        self, "neff_filepath", neff_filepath
    ),
    f"{ADDED}__init__": Cores.model,
    f"{ADDED}add": Cores.add,
    f"{ADDED}set_weights": lambda self, shards: setattr(self, "weights", shards),
    f"{ADDED}to_neuron": Cores.to_neuron,
    f"{ADDED}forward": Cores.forward,
    f"{ADDED}write_to_neuron_buffer": Cores.write,
}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library("neuronx_distributed", BEHAVIOURS)
    found.install(monkeypatch)
    return found


BUCKETS = {"gpt2": "rows=4 queries=32 context=64"}
BUCKETS["t5"] = BUCKETS["gpt2"] + " encoded=64"


@pytest.fixture(params=BUCKETS)
def models(
    request: pytest.FixtureRequest,
    checkpoints: Path,
    library: Library,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[Model, Model]]:
    monkeypatch.setenv("LMI_MULTI_NEURON_BUCKETS", BUCKETS[request.param])
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "inf2")  # the runtime would set it
    source = artifact(request.param, checkpoints)
    ours = open_executor(source, 2, LIMITS, NxdRuntime(find("inf2.48xlarge")))
    with Model(source, "cpu", on_cpu(source)) as cpu, Model(source, "neuron", ours) as neuron:
        yield cpu, neuron


def test_answers_are_those_of_the_cpu(models: tuple[Model, Model], library: Library) -> None:
    """More prompts than rows, and every kind of graph."""
    prompts = [ids(n, n) for n in (11, 3, 20, 7, 1)]
    for ending, options in OPTIONS.items():
        library.calls.clear()
        theirs, mine = (
            [c.token_ids for c in model.generate(prompts, **SIZES, **options)] for model in models
        )
        assert mine == theirs, options
        run = {c.arguments["model_name"] for c in library.calls if c.name == f"{ADDED}forward"}
        assert f"decode_4x1_of_64{ending}" in {tag.replace("_with_64", "") for tag in run}
