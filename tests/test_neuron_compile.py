"""`lmi-multi compile` with a real compiler, the emulator's: loading then compiles nothing.

These need torch-xla and jaxlib: `make test-neuron` runs them.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmi_multi import load
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.convert import convert
from lmi_multi.cli.main import run
from lmi_multi.errors import BackendError
from lmi_multi.network import Network
from tests.families import Tiny
from tests.moto_server import Moto

pytest.importorskip("torch_xla", reason="the emulator needs torch-xla: see `make test-neuron`")
pytest.importorskip("jaxlib", reason="the emulator needs jaxlib: see `make test-neuron`")

GPT2 = Tiny(
    "GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
)
SIZES = ["--tensor-parallel", "2", "--max-batch", "2", "--max-tokens", "32"]
GRAPHS = 5  # 2 rows of 1 token, greedy, sampled, or beams; 32 tokens, greedy, all logits


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMI_MULTI_NEURON_RUNTIME", "emulator")
    monkeypatch.setenv("LMI_MULTI_NEURON_BUCKETS", "rows=2 queries=32")
    GPT2.save(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "artifact", dtype="fp32")
    return tmp_path / "artifact"


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The tags that the compiler is called for."""
    from lmi_multi.backends.neuron.emulator import EmulatorBuilder
    from lmi_multi.backends.neuron.lower import Graph

    tags: list[str] = []
    real = EmulatorBuilder.compile

    def counted(self: EmulatorBuilder, graph: Graph) -> bytes:
        tags.append(graph.tag)
        return real(self, graph)

    monkeypatch.setattr(EmulatorBuilder, "compile", counted)
    yield tags


def compile_it(artifact: Path, *more: str, instance: str = "inf2.xlarge") -> int:
    return run(["compile", str(artifact), "--instance", instance, *SIZES, *more])


def tokens(artifact: Path, backend: str, degree: int = 1) -> list[list[int]]:
    """Prompts that need every graph for drawing."""
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6], list(range(3, 23))]
    sizes = {"max_batch": 2, "max_tokens": 32}
    with load(artifact, backend=backend, tensor_parallel=degree, **sizes) as model:
        return [c.token_ids for c in model.generate(prompts, max_new_tokens=8, ignore_eos=True)]


def network(artifact: Path) -> Network:
    return Network.of(Artifact.open(artifact), str(artifact))


def entries(artifact: Path) -> list[Path]:
    return list((artifact / "neuron").glob("*/*"))


def test_loading_compiles_nothing(
    artifact: Path, compiles: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compile_it(artifact) == 0
    assert len(compiles) == len(set(compiles)) == len(entries(artifact)) == GRAPHS
    shown = capsys.readouterr()
    assert Path(shown.out.strip()) == entries(artifact)[0].parent
    assert f"{GRAPHS} graphs: {GRAPHS} compiled, 0 cached" in shown.err
    assert f"{GRAPHS} of {GRAPHS} graphs, 0 s left: 0 cached, " in shown.err
    compiles.clear()
    assert tokens(artifact, "neuron", 2) == tokens(artifact, "cpu")
    assert compile_it(artifact) == 0
    assert compiles == []
    assert f"{GRAPHS} graphs: 0 compiled, {GRAPHS} cached" in capsys.readouterr().err


def test_loading_without_compiling_keeps_what_it_compiles(
    artifact: Path, compiles: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LMI_MULTI_NEURON_CACHE", str(tmp_path / "graphs"))
    first = tokens(artifact, "neuron", 2)
    assert compiles
    assert entries(artifact) == []
    compiles.clear()
    assert tokens(artifact, "neuron", 2) == first
    assert compiles == []


def test_graphs_on_s3_are_found(
    artifact: Path, compiles: list[str], aws: Moto, monkeypatch: pytest.MonkeyPatch
) -> None:
    aws.client("s3").create_bucket(Bucket="graphs")
    assert compile_it(artifact, "--cache", "s3://graphs/neuron") == 0
    assert len(compiles) == GRAPHS
    assert entries(artifact) == []
    compiles.clear()
    monkeypatch.setenv("LMI_MULTI_NEURON_CACHE", "s3://graphs/neuron")
    assert tokens(artifact, "neuron", 2) == tokens(artifact, "cpu")
    assert compiles == []


def test_other_versions_are_compiled_anew(
    artifact: Path,
    compiles: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from lmi_multi.backends.neuron import buckets, emulator

    small = ("--max-batch", "1", "--max-tokens", "16")
    monkeypatch.setenv("LMI_MULTI_NEURON_BUCKETS", "")
    monkeypatch.setattr(buckets, "MOST_VOCAB", 0)  # graphs that draw take long to compile
    assert compile_it(artifact, *small) == 0
    old = entries(artifact)
    assert not caplog.records
    compiles.clear()
    monkeypatch.setattr(emulator, "version", lambda package: "9.9")
    assert compile_it(artifact, *small) == 0
    stale = [record.getMessage() for record in caplog.records]
    assert len(compiles) == len(stale) == len(old) == 3
    assert {line.partition(" ")[0] for line in stale} == set(map(str, old))
    assert all("was compiled with jaxlib " in line for line in stale)


def test_every_size_has_a_folder_of_its_own(artifact: Path) -> None:
    from lmi_multi.backends.neuron.loading import open_cache

    from lmi_multi.backends.base import Limits

    opened = network(artifact)
    limits = Limits(max_batch=1, max_tokens=32, max_step_tokens=32, blocks=4, block_size=16)
    more = (replace(limits, max_batch=2), replace(limits, max_tokens=64))
    places = {str(open_cache(opened, 2, sizes)) for sizes in (limits, *more)}
    assert len(places | {str(open_cache(opened, 4, limits))}) == 4
    assert str(open_cache(opened, 2, limits, "/elsewhere")).startswith("/elsewhere/gpt2-")


KILLED = """
import os, signal, sys
from lmi_multi.backends.neuron.emulator import EmulatorBuilder
from lmi_multi.cli.main import run

real, compiled = EmulatorBuilder.compile, []

def compile(self, graph):
    if len(compiled) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    compiled.append(graph.tag)
    return real(self, graph)

EmulatorBuilder.compile = compile
run(sys.argv[1:])
"""


def test_a_kill_while_it_compiles(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", KILLED, "compile", str(artifact), "--jobs", "1"]
    command += ["--instance", "inf2.xlarge", *SIZES]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = [path for path in entries(artifact) if not path.name.startswith(".")]
    assert len(kept) == 2
    assert compile_it(artifact) == 0
    assert f"{GRAPHS - 2} compiled, 2 cached" in capsys.readouterr().err


def test_what_the_compiler_and_the_loader_refuse(artifact: Path) -> None:
    from lmi_multi.backends.neuron import loading
    from lmi_multi.backends.neuron.emulator import EmulatorRuntime

    from lmi_multi.backends.base import Limits

    limits = Limits(max_batch=2, max_tokens=32, max_step_tokens=32, blocks=4, block_size=16)
    made = loading.open_graphs(network(artifact), 1, limits, EmulatorRuntime())
    tag = "decode_2x1_of_32"
    builder, graph = made._builder, made[tag].graph
    with pytest.raises(BackendError, match=f"graph {tag} cannot be compiled: .*proto"):
        builder.compile(replace(graph, proto=b"junk"))
    with pytest.raises(BackendError, match=f"graph {tag} cannot be loaded: "):
        builder.load(tag, b"junk")


def test_a_module_that_the_memory_does_not_hold_is_refused(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lmi_multi.backends.neuron import lower

    monkeypatch.setattr(lower.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**10))
    assert compile_it(artifact) == 1
    assert "error: tracing needs 0.0 GiB of memory, 0.0 are free" in capsys.readouterr().err
    assert entries(artifact) == []
