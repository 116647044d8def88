"""The cache of compiled graphs: what is found, what is named and not used, and what a kill leaves.

A builder that counts stands in for a compiler here; `test_neuron_compile.py` has a real one.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from lmi_multi.backends.neuron import places
from lmi_multi.backends.neuron.cache import Cache, Key
from lmi_multi.backends.neuron.graphs import Graphs
from lmi_multi.backends.neuron.program import Compiled, Program, Toolchain, Trace

from lmi_multi.errors import BackendError, CheckpointError, OptionError
from tests.checkpoint.s3_server import BUCKET, Door, Fault

TOOLS = Toolchain("nxd", {"neuronx-cc": "2.21.1", "torch-neuronx": "2.9.0"}, "--target=inf2 -O1")
KEY = Key("decode_1x1_of_32", "ab" * 32, TOOLS)
TRACES = [Trace(f"decode_1x1_of_{32 << i}") for i in range(6)]


@dataclass(frozen=True)
class Graph:
    """As a runtime has it."""

    tag: str

    @property
    def digest(self) -> str:
        return self.tag.encode().hex()

    instructions = 1


@dataclass
class Builder:
    """Compiles a tag to its name, and fails where it is told to; notes what it compiled."""

    failing: str = ""
    together: threading.Barrier | None = None
    compiled: list[str] = field(default_factory=list)

    def lower(self, trace: Trace) -> Graph:
        return Graph(trace.tag)

    def compile(self, graph: Graph) -> bytes:
        if self.together is not None:
            self.together.wait(60)
        if graph.tag == self.failing:
            raise BackendError(f"graph {graph.tag} cannot be compiled: [NCC_EVRF007] too large")
        self.compiled.append(graph.tag)
        return b"neff of " + graph.tag.encode() + b"\n\0"

    def assemble(self, graphs: Mapping[str, Compiled[Graph]]) -> Program:
        raise NotImplementedError


def graphs(builder: Builder, cache: Cache | None, **options: Any) -> Graphs:
    return Graphs(builder, TOOLS, TRACES, cache, **options)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.fixture(params=["folder", "s3"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place that does not exist yet."""
    if request.param == "folder":
        return str(tmp_path / "somewhere" / "below")
    request.getfixturevalue("s3")
    return f"s3://{BUCKET}/graphs"


def test_what_is_put_is_found_by_others(where: str) -> None:
    Cache.at(where, "m").put(KEY, b"\n\0neff\n")
    assert Cache.at(where, "m").find(KEY) == b"\n\0neff\n"
    assert Cache.at(where, "n").find(KEY) is None
    Cache.at(where, "m").put(KEY, b"")
    assert Cache.at(where, "m").find(KEY) == b""


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (replace(KEY, digest="cd" * 32), "is of another graph: other limits, or another version"),
        (replace(KEY, toolchain=replace(TOOLS, runtime="emulator")), "runtime emulator, not nxd"),
        (replace(KEY, toolchain=replace(TOOLS, flags="-O2")), "flags '-O2', not '--target=inf2"),
        (
            replace(KEY, toolchain=replace(TOOLS, versions={"neuronx-cc": "2.20.9"})),
            "was compiled with neuronx-cc 2.20.9, here is 2.21.1; was compiled with torch-neuronx "
            "absent, here is 2.9.0",
        ),
    ],
)
def test_stale_and_foreign_entries_are_named_and_not_used(
    other: Key, why: str, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    Cache.at(where, "m").put(other, b"old")
    Cache.at(where, "m").put(replace(KEY, tag="decode_1x1_of_32_all"), b"of another tag")
    assert Cache.at(where, "m").find(KEY) is None
    (said,) = warnings(caplog)
    assert f"{where}/m/{other.name} " in said
    assert why in said
    assert said.endswith(": not used")
    Cache.at(where, "m").put(KEY, b"new")  # beside it: whoever needs the other one still finds it
    assert (Cache.at(where, "m").find(KEY), Cache.at(where, "m").find(other)) == (b"new", b"old")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda whole: whole[:-1], "has 3 bytes of a graph, expected 4"),
        (lambda whole: whole[:-1] + b"F", "has another sha256 than when it was written"),
        (lambda whole: whole[:40], "is no compiled graph, or of another version of lmi_multi"),
        (lambda whole: b"", "is no compiled graph"),
        (lambda whole: whole.replace(b"nxd", b"emu"), "is for the runtime emu, not nxd"),
    ],
)
def test_damaged_entries_are_named_and_not_used(
    spoil: Any, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Cache.at(tmp_path, "m").put(KEY, b"neff")
    entry = tmp_path / "m" / KEY.name
    entry.write_bytes(spoil(entry.read_bytes()))
    assert Cache.at(tmp_path, "m").find(KEY) is None
    (said,) = warnings(caplog)
    assert f"{entry} {why}" in said
    Cache.at(tmp_path, "m").put(KEY, b"new")
    assert Cache.at(tmp_path, "m").find(KEY) == b"new"


def test_foreign_files_of_the_same_tag_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"{KEY.tag}-0123.graph"
    (tmp_path / name).write_text("somebody's notes")
    assert Cache.at(tmp_path, "").find(KEY) is None
    assert warnings(caplog)[0].startswith(f"{tmp_path}/{name} is no compiled graph")


def test_places_that_do_not_work(s3: Door, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"'s3://' is no address on S3, expected s3://BUCKET"):
        Cache.at("s3://", "m")
    with pytest.raises(CheckpointError, match="there is no such bucket"):
        Cache.at("s3://absent/graphs", "m")
    (tmp_path / "m").write_text("a file")
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'm'} cannot be read: Not a directory"):
        Cache.at(tmp_path, "m")
    cache = Cache.at(f"s3://{BUCKET}/graphs", "m")
    s3.fault = lambda request: Fault(403, b"<Error><Code>AccessDenied</Code></Error>")
    with pytest.raises(CheckpointError, match=rf"{KEY.name}: access denied \(PutObject\)"):
        cache.put(KEY, b"neff")


def test_several_are_compiled_at_once_and_only_once(tmp_path: Path) -> None:
    told: list[tuple[int, int, int]] = []
    first = Builder(together=threading.Barrier(3))
    made = graphs(first, Cache.at(tmp_path, "m"))
    made.make_all(3, lambda count, tag: told.append((count.done, count.total, count.hits)))
    assert sorted(first.compiled) == sorted(trace.tag for trace in TRACES)
    assert told == [(n, 6, 0) for n in range(1, 7)]

    second = Builder()
    again = graphs(second, Cache.at(tmp_path, "m"))
    again.make_all(3)
    assert (again.count.hits, second.compiled) == (6, [])
    assert {t: c.binary for t, c in again.items()} == {t: c.binary for t, c in made.items()}
    assert again["decode_1x1_of_64"].binary == b"neff of decode_1x1_of_64\n\0"


def test_one_that_is_asked_for_is_made_alone(tmp_path: Path) -> None:
    builder = Builder()
    made = graphs(builder, Cache.at(tmp_path, "m"))
    assert made[TRACES[2].tag].binary == made[TRACES[2].tag].binary
    assert builder.compiled == [TRACES[2].tag]
    made.make_all(2)
    assert sorted(builder.compiled) == sorted(trace.tag for trace in TRACES)
    assert graphs(Builder(), None)["decode_1x1_of_32"].binary.startswith(b"neff")


def test_a_graph_that_fails_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    failing = TRACES[3].tag
    first = Builder(failing)
    with pytest.raises(BackendError, match=rf"graph {failing} cannot .*\[NCC_EVRF007\] too large"):
        graphs(first, Cache.at(tmp_path, "m")).make_all(1)
    kept = {path.name.partition("-")[0] for path in (tmp_path / "m").iterdir()}
    assert kept == set(first.compiled)
    assert {trace.tag for trace in TRACES[:3]} <= kept
    second = Builder()
    again = graphs(second, Cache.at(tmp_path, "m"))
    again.make_all(1)
    assert again.count.hits == len(kept)
    assert set(second.compiled) == {trace.tag for trace in TRACES} - kept


def test_a_cache_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It stops `compile`, whose product it is, and not a model that loads."""
    cache = Cache.at(tmp_path, "m")
    (tmp_path / "m").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written"):
        graphs(Builder(), cache, must_keep=True).make_all(2)
    builder = Builder()
    graphs(builder, cache).make_all(1)
    assert len(builder.compiled) == 6
    assert len(warnings(caplog)) == 1


KILLED = """
import os, signal, sys
from lmi_multi.backends.neuron.cache import Cache, Key
from lmi_multi.backends.neuron.program import Toolchain
os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
Cache.at(sys.argv[1], "m").put(Key("decode_1x1_of_32", "ab", Toolchain("nxd", {})), bytes(2**20))
"""


def test_a_kill_in_the_midst_of_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=240)
    assert done.returncode == -signal.SIGKILL
    (left,) = (tmp_path / "m").iterdir()
    assert left.stat().st_size == 2**20 + left.read_bytes().index(b"\n") + 1
    key = Key("decode_1x1_of_32", "ab", Toolchain("nxd", {}))
    cache = Cache.at(tmp_path, "m")
    assert cache.find(key) is None
    cache.put(key, b"neff")
    assert left.exists()  # it could be another process's that still writes
    os.utime(left, (0, left.stat().st_mtime - places.ABANDONED_SECONDS - 60))
    cache.put(key, b"neff")
    assert [path.name for path in (tmp_path / "m").iterdir()] == [key.name]


def test_loading_tells_once_that_it_compiles(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    told = f"graph {TRACES[0].tag} of 6 is not cached and is compiled now; compile them ahead with"
    place = str(tmp_path)
    graphs(Builder(), Cache.at(place, "m")).make_all(1)
    assert [r.getMessage() for r in caplog.records] == [f"{told} `lmi-multi compile`"]
    caplog.clear()
    graphs(Builder(), Cache.at(place, "m")).make_all(1)
    graphs(Builder(), Cache.at(place, "n"), must_keep=True).make_all(1)  # as `compile` does
    assert not caplog.records


def test_graphs_for_other_sizes_are_named_once(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for sizes in ("tp2-1x32", "tp2-4x32", "tp4-1x32"):
        Cache.at(where, f"gpt2-ab-{sizes}", "gpt2-ab-").put(KEY, b"neff")
    Cache.at(where, "gpt2-cd-tp2-2x64", "gpt2-cd-").put(KEY, b"of another model")
    graphs(Builder(), Cache.at(where, "gpt2-ab-tp2-2x64", "gpt2-ab-")).make_all(1)
    told = [r.getMessage() for r in caplog.records if "other sizes" in r.getMessage()]
    assert told == [
        "graphs of the same model for other sizes are not used: "
        f"{where}/gpt2-ab-tp2-1x32 and 2 more"
    ]
    caplog.clear()
    graphs(Builder(), Cache.at(where, "gpt2-ab-tp2-2x64", "gpt2-ab-")).make_all(1)
    graphs(Builder(), Cache.at(where, "gpt2-ef-tp2-2x64", "gpt2-ef-")).make_all(1)
    assert not [r for r in caplog.records if "other sizes" in r.getMessage()]


@pytest.mark.parametrize("where", ["gs://bucket/x", "file:///tmp/x", "S3://bucket/x"])
def test_other_schemes_are_refused(where: str) -> None:
    with pytest.raises(OptionError, match=f"cache is '{where}', must be a folder or s3://BUCKET"):
        Cache.at(where, "m")


def test_a_folder_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves `--cache=~/graphs` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Cache.at("~/graphs", "m").put(KEY, b"neff")
    assert (tmp_path / "graphs" / "m" / KEY.name).is_file()
    with pytest.raises(OptionError, match="cache is '~nobody-of-this-name/graphs': "):
        Cache.at("~nobody-of-this-name/graphs", "m")
