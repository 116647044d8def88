"""Descriptions: what they say, and that weights are not read for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmi_multi.checkpoint.convert import convert
from lmi_multi.checkpoint.inspect import describe
from lmi_multi.checkpoint.reader import SafetensorsFile
from lmi_multi.errors import CheckpointError

from .tiny import LLAMA


def test_checkpoint(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    plain = SafetensorsFile.read

    def counting(self: SafetensorsFile, name: str, *rows: int | None) -> object:
        read.append(name)
        return plain(self, name, *rows)

    monkeypatch.setattr(SafetensorsFile, "read", counting)
    found = describe(checkpoint)
    assert set(read) == {"lm_head.weight", "model.embed_tokens.weight"}  # whether it is tied
    assert found.kind == "checkpoint" and found.family == "llama" and not found.tied_head
    assert found.architecture == LLAMA["architectures"][0]
    assert found.bytes_per_rank == 4 * found.parameters
    assert found.degrees == [1, 2, 4] and found.sizes["kv_heads"] == 2
    assert set(found.files) == {"config.json", "model.safetensors"}
    assert found.verified == "no hashes"


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_artifact(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    convert(checkpoint, tmp_path / "out", dtype="bf16", quantize=kind, tensor_parallel=2)
    found = describe(tmp_path / "out")
    assert (found.dtype, found.quantize, found.tensor_parallel) == ("bf16", kind, 2)
    assert found.verified == "not requested" and found.source == str(checkpoint)
    assert describe(tmp_path / "out", verify=True).verified == "yes"
    size = found.files["rank-0-of-2.safetensors"]
    assert found.bytes_per_rank < size < found.bytes_per_rank + 4096
    assert json.loads(json.dumps(found.to_json()))["kind"] == "artifact"


def test_artifact_without_config(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "out")
    path = tmp_path / "out" / "lmi_multi.json"
    data = json.loads(path.read_text())
    del data["files"]["config.json"]
    path.write_text(json.dumps(data))
    (tmp_path / "out" / "config.json").unlink()
    assert describe(tmp_path / "out").architecture is None


def test_broken(checkpoint: Path, tmp_path: Path) -> None:
    folder = convert(checkpoint, tmp_path / "out").folder
    path = folder / "rank-0-of-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    describe(folder)
    with pytest.raises(CheckpointError, match="has sha256"):
        describe(folder, verify=True)
