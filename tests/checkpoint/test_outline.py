"""Headers of remote checkpoints: what is fetched of them, and that it tells the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lmi_multi.checkpoint import outline
from lmi_multi.checkpoint.convert import convert
from lmi_multi.checkpoint.outline import outlined
from lmi_multi.errors import CheckpointError, OptionError
from lmi_multi.network import read_network

from .hub_server import Hub
from .s3_server import BUCKET, Door
from .test_source import hub
from .tiny import llama_state, write_sharded

__all__ = ["hub"]  # a fixture


def same(left: object, right: object) -> None:
    for name in ("spec", "tensors", "dtype", "quantize", "is_artifact"):
        assert getattr(left, name) == getattr(right, name)


def test_local_folders_stay_where_they_are(checkpoint: Path) -> None:
    with outlined(checkpoint) as found:
        assert found.folder == checkpoint
    with pytest.raises(CheckpointError, match="does not exist"), outlined("./none"):
        pass
    with pytest.raises(OptionError, match="source is empty"), outlined(" "):
        pass


def test_headers_on_s3(s3: Door, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outline, "HEAD", 64)  # shorter than any header
    url = s3.put("m", checkpoint)
    with outlined(url) as found:
        folder, weights = found.folder, found.folder / "model.safetensors"
        assert weights.stat().st_size == (checkpoint / "model.safetensors").stat().st_size
        assert weights.stat().st_blocks * 512 <= 8192 < weights.stat().st_size
    assert not folder.exists()
    ranges = [r.range for r in s3.data if r.name == "model.safetensors"]
    assert ranges[0] == "bytes=0-63" and len(ranges) == 2
    last = int(str(ranges[1]).rpartition("-")[2])
    assert last < 4096
    same(read_network(url), read_network(checkpoint))


def test_shards_on_s3(s3: Door, tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "shards", llama_state(), "safetensors")
    same(read_network(s3.put("m", folder)), read_network(folder))


def test_artifacts_on_s3(s3: Door, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{}")
    convert(checkpoint, tmp_path / "out", dtype="bf16", quantize="int8", tensor_parallel=2)
    same(read_network(s3.put("a", tmp_path / "out")), read_network(tmp_path / "out"))
    assert {r.name for r in s3.data} == {"config.json", "lmi_multi.json"}


def test_wrong_headers_on_s3(s3: Door, checkpoint: Path) -> None:
    url = s3.put("m", checkpoint)
    for data, message in (
        (b"", "has 0 bytes, expected a safetensors file"),
        (b"\xff" * 100, r"^s3://models/m/model.safetensors: header length is \d+ bytes"),
        (b"\x10" + b"\0" * 7 + b"{}", "is truncated"),
        (b"version https://git-lfs.github.com/spec/v1\nsize 5\n", "git-LFS|not safetensors"),
    ):
        s3.client.put_object(Bucket=BUCKET, Key="m/model.safetensors", Body=data)
        with pytest.raises(CheckpointError, match=message):
            read_network(url)
    torch.save(llama_state(), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"there are only pytorch_model.bin; convert it"):
        read_network(s3.put("bin", checkpoint))


CLIENT = """
import json, sys
from lmi_multi.checkpoint import outline
from lmi_multi.errors import LmiError
from lmi_multi.network import read_network

outline.HEAD = 64
for source in sys.argv[1:]:
    try:
        network = read_network(source)
        print(json.dumps([network.source, list(network.tensors)]))
    except LmiError as error:
        print(json.dumps(str(error)))
"""


def test_headers_on_the_hub(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    def read(*names: str, **environment: str) -> list[Any]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")} | environment
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, *names],
            env=kept | settings,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    hub.sent.clear()
    both, none, bins = read("org/both", "org/none", "org/bin")
    assert both == ["org/both", list(read_network(checkpoint).tensors)]
    assert 0 < hub.sent["model.safetensors"] < (checkpoint / "model.safetensors").stat().st_size / 2
    assert none.startswith("org/none is neither a local folder nor a model on the Hub")
    assert "there are only pytorch_model.bin; convert it" in bins
    (offline,) = read("org/both", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in offline
