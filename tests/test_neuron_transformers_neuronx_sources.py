"""What is written for transformers-neuronx, loaded by its own sources.

`make test-neuron-sources TNX=CHECKOUT` runs it, with a checkout of the public repository, in a
process of its own, whose packages for Neuron are stand-ins. Its networks are built of HLO by closed
parts, so nothing of them runs; its classes, settings, weights and all up to the graphs are real.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lmi_multi.backends.neuron.cache import Cache, Key
from lmi_multi.backends.neuron.program import Toolchain
from lmi_multi.backends.neuron.transformers_neuronx import (
    ManyRows,
    OneRow,
    opener,
    plan_rows,
)
from lmi_multi.backends.neuron.transformers_neuronx_export import exported
from lmi_multi.backends.neuron.transformers_neuronx_graphs import compile_ahead, to_cores
from lmi_multi.backends.neuron.transformers_neuronx_ports import PORTS, find_port
from safetensors import safe_open

from tests import nxd_closed_parts as closed
from tests.families import VOCAB
from tests.neuron_libraries import parameters, real, signatures
from tests.transformers_neuronx_stand_in import MANY, RUN, artifact

SOURCES = os.environ.get("LMI_MULTI_TNX_SOURCES")
if not SOURCES:
    pytest.skip(
        "needs transformers-neuronx's sources: see `make test-neuron-sources`",
        allow_module_level=True,
    )
closed.install_finder(Path(SOURCES) / "src")
LIBRARY = "transformers_neuronx"


@pytest.mark.parametrize("name", signatures(LIBRARY))
def test_signatures_are_those_of_the_sources(name: str) -> None:
    theirs = real(LIBRARY, name)
    assert Path(sys.modules[LIBRARY].__file__ or "").is_relative_to(Path(SOURCES or "").resolve())
    assert parameters(theirs) == parameters(signatures(LIBRARY)[name])


def opened(family: str, checkpoints: Path) -> tuple[Any, Path]:
    """The library's model before `to_neuron`, and the checkpoint that it was given."""
    source = artifact(family, checkpoints)
    folder = exported(source, find_port(source))
    return maker(family, checkpoints)(), folder


def maker(family: str, checkpoints: Path) -> Callable[[], Any]:
    """What opens the library's model, as it does for two cores."""
    source = artifact(family, checkpoints)
    port = find_port(source)
    limits = plan_rows(source, port, 2, 2**30, None, 64)
    return opener(source, port, limits, 2, exported(source, port))


@pytest.mark.parametrize("family", RUN)
def test_every_weight_is_found(family: str, checkpoints: Path) -> None:
    if family == "gptneox" and transformers.__version__.startswith("5."):
        pytest.skip("transformers 5 has no rotary_pct, which the library reads")
    kept, folder = opened(family, checkpoints)
    network = getattr(kept, "chkpt_model", kept)
    places = {name: p for name, p in network.named_parameters() if hasattr(p, "_file_path")}
    assert set(dict(network.named_parameters())) - set(places) <= {"embed_out.bias"}
    for name, parameter in places.items():
        with safe_open(parameter._file_path, "pt") as file:
            assert file.get_tensor(parameter._global_key).dtype == torch.float32, name
    files = folder.glob("*.safetensors")
    written = {key for path in files for key in safe_open(path, "pt").keys()}  # noqa: SIM118
    assert {p._global_key for p in places.values()} == written


class Decoder:
    """In the place of the compiled graphs: notes what they would get. A row's logits are all its
    number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers_neuronx import decoder

        self.calls: list[tuple[int, Any, Any, Any]] = []

        def forward(graph: Any, hidden: Any, places: Any, rows: Any, last: Any, *more: Any) -> Any:
            self.calls.append((graph.n_active_tokens, *(x.tolist() for x in (places, rows, last))))
            return rows.float().expand(VOCAB, 1, -1)

        monkeypatch.setattr(decoder.DecoderLmHeadForSamplingNoEmbedding, "forward", forward)


@pytest.mark.parametrize("family", MANY)
def test_rows_reach_the_graphs_with_their_numbers(
    family: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, graphs = opened(family, checkpoints)[0], Decoder(monkeypatch)
    kept.materialize_embeddings()
    rows = ManyRows(kept, 4)
    logits = rows.prompt(2, [5, 6, 7])
    assert logits.tolist() == [2.0] * VOCAB
    assert graphs.calls == [(64, [[*range(64)]], [2], [2])]
    found = rows.tokens({3: (9, 0), 2: (8, 3)})
    assert {row: set(logits.tolist()) for row, logits in found.items()} == {3: {3.0}, 2: {2.0}}
    assert graphs.calls[1:] == [(1, [[0], [0], [3], [0]], [0, 1, 2, 3], [0] * 4)]


@pytest.mark.parametrize("family", ["gpt2", "opt", "bloom"])
def test_a_row_reaches_the_graphs_with_its_places(
    family: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers_neuronx.tensor_pool import TensorPool

    kept, graphs = opened(family, checkpoints)[0], Decoder(monkeypatch)
    kept.materialize_embeddings()
    kept.tensor_pool = TensorPool()  # GPT-2's, which it makes with its graphs
    rows = OneRow(kept)
    assert rows.prompt(0, [5, 6, 7]).shape == (VOCAB,)
    assert rows.tokens({0: (8, 3)})[0].shape == (VOCAB,)
    assert graphs.calls == [(64, [*range(64)], [0], [2]), (1, [3], [0], [0])]


class Kernel:
    """In the place of a graph, which closed parts build."""

    num_exec_repetition = 1

    def __init__(self, number: int) -> None:
        self.hlo_module = Hlo(number)
        self.neff_bytes: bytes | None = None

    def compile(self, repetition: int) -> bytes:
        return b"neff of " + self.hlo_module.SerializeToString()


class Hlo:
    def __init__(self, number: int) -> None:
        self.number = number

    def SerializeToString(self) -> bytes:  # noqa: N802
        return b"graph %d" % self.number


@pytest.mark.parametrize("family", [name for name, port in PORTS.items() if port.reads_prompts])
def test_graphs_are_saved_and_found(
    family: str, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own compiling without cores, saving and loading."""
    from transformers_neuronx import decoder, ops

    make = maker(family, checkpoints)
    graphs: dict[int, Kernel] = {}

    def kernels(self: Any) -> list[Kernel]:
        return [graphs.setdefault(id(self), Kernel(self.n_active_tokens))]

    monkeypatch.setattr(decoder.DecoderLmHeadForSamplingNoEmbedding, "get_all_kernels", kernels)
    monkeypatch.setattr(ops, "init", lambda: None)
    for part in ("load_weights", "setup"):
        monkeypatch.setattr(type(make()), part, lambda self: None)
    cache, key = Cache.at(tmp_path, "graphs"), Key("model", "0", Toolchain("tnx", {}))
    count, hit = compile_ahead(make, cache, key)
    assert count
    assert not hit
    graphs.clear()
    monkeypatch.setattr(Kernel, "compile", None)  # nothing is compiled when it is loaded
    to_cores(make, Cache.at(tmp_path, "graphs"), key)
    assert {k.neff_bytes for k in graphs.values()} == {
        b"neff of " + k.hlo_module.SerializeToString() for k in graphs.values()
    }
