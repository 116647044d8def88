"""Finding a source: the demo, a folder, or the Hub (a stand-in that the real client talks to)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lmi_multi.checkpoint import source as module
from lmi_multi.checkpoint.source import Source, resolve
from lmi_multi.errors import CheckpointError, OptionError

from .hub_server import Hub, serve
from .tiny import llama_state, write

COMMIT, OTHER = "a" * 40, "b" * 40


def test_local_folder(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = resolve(checkpoint)
    assert found.name == str(checkpoint) and found.folder == checkpoint
    assert found.revision is not None and found.revision.startswith("local-")
    monkeypatch.chdir(checkpoint.parent)
    assert resolve("checkpoint") == resolve("./checkpoint") == resolve("checkpoint/") == found
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert resolve("~/checkpoint") == found


def test_fingerprint_follows_the_files_that_count(checkpoint: Path) -> None:
    first = resolve(checkpoint).revision
    (checkpoint / "README.md").write_text("words")
    assert resolve(checkpoint).revision == first
    (checkpoint / "generation_config.json").write_text("{}")
    second = resolve(checkpoint).revision
    os.utime(checkpoint / "config.json", ns=(5, 5))
    third = resolve(checkpoint).revision
    assert len({first, second, third}) == 3


def test_demo(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demo = SimpleNamespace(CHECKPOINT=checkpoint)
    monkeypatch.setattr(module, "importlib", SimpleNamespace(import_module=lambda name: demo))
    found = resolve("demo")
    assert found.name == "demo" and found.folder == checkpoint
    with pytest.raises(OptionError, match="demo is a local folder without any"):
        resolve("demo", revision="main")
    write(tmp_path / "demo", llama_state())
    assert resolve("demo").folder == tmp_path / "demo"
    demo.CHECKPOINT = tmp_path / "none"
    monkeypatch.chdir(checkpoint)
    with pytest.raises(CheckpointError, match="demo model is not installed"):
        resolve("demo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/no/such/folder", "the folder /no/such/folder does not exist"),
        ("./none", r"the folder \./none does not exist"),
        ("../none", "does not exist"),
        ("~/no/such/folder", "does not exist"),
        ("~nobody-by-this-name/x", "is not a usable path"),
        (Path("none"), "the folder none does not exist"),
        (Path("s3://bucket/model"), "the folder s3:/bucket/model does not exist"),
        ("x" * 300, "is not a usable path|neither a local folder nor a Hub id"),
        ("too/many/parts", "'too/many/parts' is neither a local folder nor a Hub id"),
        ("spaces in it", "neither a local folder nor a Hub id"),
        ("nul\0byte", "neither a local folder nor a Hub id"),
    ],
)
def test_no_such_source(text: str | Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [None, 3, b"gpt2"])
def test_a_source_is_text_or_a_path(source: Any) -> None:
    with pytest.raises(OptionError, match=rf"source is {source!r}, must be a folder"):
        resolve(source)


def test_empty_source_and_local_revision(checkpoint: Path) -> None:
    with pytest.raises(OptionError, match="source is empty"):
        resolve("  ")
    with pytest.raises(OptionError, match="revision is 'main'"):
        resolve(checkpoint, revision="main")


def test_a_file_is_no_source(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file, expected the folder"):
        resolve(checkpoint / "config.json")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Repositories in safetensors, in .bin, and gated."""
    folder = write(tmp_path_factory.mktemp("hub"), llama_state())
    torch.save(llama_state(), folder / "pytorch_model.bin")
    config = (folder / "config.json").read_bytes()
    weights = (folder / "model.safetensors").read_bytes()
    pickled = (folder / "pytorch_model.bin").read_bytes()
    useless = {"README.md": b"x", "tf_model.h5": b"x", "modeling.py": b"x", "onnx/model.onnx": b"x"}
    useless |= {"original/model.safetensors": b"x", "consolidated.safetensors": b"x"}
    both = {"config.json": config, "tokenizer.json": b"{}", "model.safetensors": weights}
    with serve() as hub:
        hub.repos["org/both"] = {
            "main": COMMIT,
            "old": OTHER,
            COMMIT: both | useless | {"pytorch_model.bin": b"never fetched"},
            OTHER: both | {"tokenizer.json": b"[]"},
        }
        hub.repos["org/bin"] = {
            "main": COMMIT,
            COMMIT: {"config.json": config, "pytorch_model.bin": pickled},
        }
        hub.repos["org/gated"] = {"main": COMMIT, COMMIT: both}
        hub.gated.add("org/gated")
        yield hub


CLIENT = """
import json, sys
from lmi_multi.checkpoint.source import resolve
from lmi_multi.errors import LmiError

answers = []
for source, revision in json.loads(sys.argv[1]):
    try:
        found = resolve(source, revision)
        files = sorted(path.name for path in found.folder.iterdir())
        answers.append([found.name, found.revision, str(found.folder), files])
    except LmiError as error:
        answers.append(f"{type(error).__name__}: {error}")
print(json.dumps(answers))
"""


def ask(
    hub: Hub | None, home: Path, *sources: tuple[str, str | None], **environment: str
) -> list[Any]:
    """Resolve `sources` in a process of its own: huggingface_hub reads its settings at import."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    url = hub.url if hub else "http://127.0.0.1:9"
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(sources)],
        env=kept | settings | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    answers: list[Any] = json.loads(result.stdout.splitlines()[-1])
    assert all("\n" not in answer for answer in answers if isinstance(answer, str))
    return answers


def test_hub(hub: Hub, tmp_path: Path) -> None:
    hub.requests.clear()
    both, old, commit, pickled = ask(
        hub,
        tmp_path,
        ("org/both", None),
        ("org/both", "old"),
        ("org/both", COMMIT),
        ("org/bin", None),
    )
    name, revision, folder, files = both
    assert (name, revision) == ("org/both", COMMIT) and Path(folder).name == COMMIT
    assert files == ["config.json", "model.safetensors", "tokenizer.json"]
    assert old[1] == OTHER and commit == both
    assert pickled[3] == ["config.json", "pytorch_model.bin"]
    fetched = [path for path in hub.requests if "/resolve/" in path]
    assert not any("both" in path and path.endswith(".bin") for path in fetched)
    assert not any(path.endswith((".py", ".h5", ".onnx")) for path in fetched)
    offline_answers = ask(
        None,
        tmp_path,
        ("org/both", None),
        ("org/both", "old"),
        ("org/bin", None),
        ("org/both", "unseen"),
        ("org/unseen", None),
        HF_HUB_OFFLINE="1",
    )
    assert offline_answers[:3] == [both, old, pickled]
    for answer, at in zip(offline_answers[3:], ("'unseen' of org/both", "org/unseen"), strict=True):
        assert answer.startswith("CheckpointError: ") and "HF_HUB_OFFLINE is set" in answer
        assert at in answer and "no local folder and not (wholly) in the Hub cache" in answer


def test_hub_errors(hub: Hub, tmp_path: Path) -> None:
    missing, gated, revision = ask(
        hub, tmp_path, ("org/none", None), ("org/gated", None), ("org/both", "nope")
    )
    assert missing.startswith(
        "CheckpointError: org/none is neither a local folder nor a model on the Hub"
    )
    assert "org/gated is gated on the Hub" in gated and "HF_TOKEN" in gated
    assert revision == "CheckpointError: org/both has no revision 'nope' on the Hub"


def test_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    (answer,) = ask(None, tmp_path, ("org/both", None))
    assert "org/both is no local folder" in answer and "the Hub cannot be reached" in answer


def test_hub_sources_are_converted_and_cached(hub: Hub, tmp_path: Path) -> None:
    (both,) = ask(hub, tmp_path, ("org/both", None))
    from lmi_multi.checkpoint.cache import entry_folder
    from lmi_multi.checkpoint.convert import convert

    source = Source(both[0], Path(both[2]), both[1])
    artifact = convert(source, tmp_path / "out")
    assert artifact.manifest.source.model_dump() == {"name": "org/both", "revision": COMMIT}
    assert (artifact.folder / "tokenizer.json").read_text() == "{}"
    assert not (artifact.folder / "config.json").is_symlink()
    assert entry_folder(source, "auto", None, 1).name.startswith("org--both-")
