"""The cache: converts once, keyed by everything that matters, whoever asks at the same time."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lmi_multi.checkpoint import cache as module
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.cache import open_or_convert
from lmi_multi.checkpoint.convert import convert
from lmi_multi.checkpoint.files import cache_dir
from lmi_multi.errors import CheckpointError, OptionError

from .tiny import llama_state, write

AT_ONCE = """
import os, sys
from pathlib import Path
import torch
from lmi_multi.checkpoint import cache

torch.set_num_threads(1)
plain = cache.convert

def counting(*args, **options):
    os.write(log, b"x")
    return plain(*args, **options)

cache.convert = counting
log = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
children = []
for _ in range(6):
    child = os.fork()
    if child == 0:
        try:
            artifact = cache.open_or_convert(sys.argv[1], dtype="bf16")
            assert artifact.load_rank(0, 1)["embed.weight"].shape == (37, 16)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
sys.exit(max(codes))
"""


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The targets that were converted."""
    targets: list[Path] = []

    def counting(source: Any, target: Path, **options: Any) -> Artifact:
        targets.append(target)
        return convert(source, target, **options)

    monkeypatch.setattr(module, "convert", counting)
    return targets


def test_converts_once(checkpoint: Path, cache: Path, conversions: list[Path]) -> None:
    first = open_or_convert(checkpoint, dtype="bf16")
    second = open_or_convert(str(checkpoint), dtype="bf16", verify=True)
    assert first.folder == second.folder and len(conversions) == 1
    assert first.folder.parent == cache / "artifacts"
    assert first.folder.name.startswith("checkpoint-")


def test_every_option_has_its_own_entry(checkpoint: Path, conversions: list[Path]) -> None:
    for options in (
        {},
        {"dtype": "bf16"},
        {"quantize": "int8"},
        {"tensor_parallel": 2},
        {"dtype": "bf16", "quantize": "int8", "tensor_parallel": 2},
    ):
        open_or_convert(checkpoint, **options)
    assert len(set(conversions)) == 5
    write(checkpoint, llama_state(seed=1))  # other content, same sizes
    os.utime(checkpoint / "model.safetensors", ns=(1, 1))
    artifact = open_or_convert(checkpoint)
    assert len(set(conversions)) == 6
    embed = artifact.load_rank(0, 1)["embed.weight"]
    assert torch.equal(embed, llama_state(seed=1)["model.embed_tokens.weight"])


@pytest.mark.parametrize("fault", ["truncated", "missing", "manifest", "no manifest", "altered"])
def test_broken_entries_are_converted_again(
    checkpoint: Path, conversions: list[Path], caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    folder = open_or_convert(checkpoint).folder
    weights = folder / "rank-0-of-1.safetensors"
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:100])
    elif fault == "missing":
        weights.unlink()
    elif fault == "manifest":
        (folder / "lmi_multi.json").write_text("{")
    elif fault == "no manifest":
        (folder / "lmi_multi.json").unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with caplog.at_level(logging.WARNING):
        open_or_convert(checkpoint, verify=fault == "altered")
    assert len(conversions) == 2
    if fault != "no manifest":
        assert "cached artifact is broken and will be converted again" in caplog.text
    open_or_convert(checkpoint, verify=True)
    assert len(conversions) == 2


def test_many_processes_at_once(checkpoint: Path, tmp_path: Path, cache: Path) -> None:
    log = tmp_path / "log"
    result = subprocess.run(
        [sys.executable, "-c", AT_ONCE, str(checkpoint), str(log)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert log.read_bytes() == b"x"
    kept = [path.name for path in (cache / "artifacts").iterdir() if path.suffix != ".lock"]
    assert len(kept) == 1


def test_artifacts_open_directly(
    checkpoint: Path, tmp_path: Path, conversions: list[Path], cache: Path
) -> None:
    convert(checkpoint, tmp_path / "artifact", dtype="bf16", quantize="int8")
    artifact = open_or_convert(tmp_path / "artifact", tensor_parallel=2)
    assert artifact.folder == tmp_path / "artifact" and artifact.tensor_parallel == 1
    open_or_convert(tmp_path / "artifact", dtype="bf16", quantize="int8", verify=True)
    assert not conversions and not cache.exists()
    with pytest.raises(OptionError, match=r"dtype is 'fp32', but the artifact .* with 'bf16'"):
        open_or_convert(tmp_path / "artifact", dtype="fp32")
    with pytest.raises(OptionError, match="revision"):
        open_or_convert(tmp_path / "artifact", revision="main")
    convert(checkpoint, tmp_path / "plain")
    with pytest.raises(OptionError, match=r"quantize is 'int8', but the artifact .* with None"):
        open_or_convert(tmp_path / "plain", quantize="int8")


def test_invalid_options_come_first(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="dtype is 'half'"):
        open_or_convert(tmp_path / "nowhere", dtype="half")


def test_failed_conversion_leaves_no_entry(checkpoint: Path, cache: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has 0 bytes"):
        open_or_convert(checkpoint)
    assert [p for p in (cache / "artifacts").iterdir() if p.suffix != ".lock"] == []


def test_unusable_cache_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LMI_MULTI_CACHE", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="LMI_MULTI_CACHE names another folder"):
        open_or_convert(checkpoint)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMI_MULTI_CACHE", "~/models")
    assert cache_dir() == Path.home() / "models"
    monkeypatch.delenv("LMI_MULTI_CACHE")
    assert cache_dir().name == "lmi_multi"
