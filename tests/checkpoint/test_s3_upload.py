"""Artifacts put on S3: a reader sees a whole one or none."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.cache import open_or_convert
from lmi_multi.checkpoint.convert import convert
from lmi_multi.checkpoint.s3.address import Address
from lmi_multi.checkpoint.s3.upload import upload
from lmi_multi.checkpoint.source import resolve
from lmi_multi.cli.main import run
from lmi_multi.errors import CheckpointError, OptionError

from .s3_server import BUCKET, Door, Fault, names


def test_publish_then_load(s3: Door, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = f"s3://{BUCKET}/published"
    args = ["convert", str(checkpoint), target, "--dtype", "bf16", "--tensor-parallel", "2"]
    assert run(args) == 0
    assert capsys.readouterr().out == f"{target}\n"
    puts = [request.name for request in s3.requests if request.method == "PUT"]
    assert puts[-1] == "lmi_multi.json" and puts.count("lmi_multi.json") == 1
    opened = open_or_convert(target, tensor_parallel=2, verify=True)
    assert opened.dtype == "bf16" and opened.manifest.source.name == str(checkpoint)
    assert names(opened.folder) == s3.keys("published")


def test_publish_an_artifact(s3: Door, artifact: Artifact) -> None:
    target = f"s3://{BUCKET}/as-it-is"
    assert run(["convert", str(artifact.folder), target, "--tensor-parallel", "2"]) == 0
    assert s3.keys("as-it-is") == names(artifact.folder)
    assert run(["convert", str(artifact.folder), target, "--tensor-parallel", "4"]) == 2


def test_half_an_upload_is_no_artifact(s3: Door, artifact: Artifact) -> None:
    address = Address.parse(f"s3://{BUCKET}/half")
    upload(artifact, address)
    again = convert(artifact.manifest.source.name, artifact.folder.parent / "b", tensor_parallel=2)

    refuse = Fault(403, b"<Error><Code>AccessDenied</Code></Error>")
    s3.fault = lambda r: refuse if r.method == "PUT" and r.name.startswith("rank-1") else None
    with pytest.raises(CheckpointError, match=r"s3://models/half/rank-1.*access denied"):
        upload(again, address)
    s3.fault = lambda r: None
    assert "lmi_multi.json" not in s3.keys("half")
    with pytest.raises(CheckpointError, match="holds no weights"):
        resolve(str(address))
    s3.requests.clear()
    upload(again, address)
    puts = [request.name for request in s3.requests if request.method == "PUT"]
    assert "rank-0-of-2.safetensors" not in puts and puts[-1] == "lmi_multi.json"
    assert open_or_convert(str(address), verify=True).dtype == "fp32"


def test_upload_replaces_other_degrees(s3: Door, artifact: Artifact, checkpoint: Path) -> None:
    address = Address.parse(f"s3://{BUCKET}/replaced")
    upload(artifact, address)
    upload(convert(checkpoint, artifact.folder.parent / "one"), address)
    assert {name for name in s3.keys("replaced") if name.startswith("rank")} == {
        "rank-0-of-1.safetensors"
    }
    assert open_or_convert(str(address)).tensor_parallel == 1


def test_upload_replaces_nothing_else(s3: Door, artifact: Artifact, checkpoint: Path) -> None:
    address = Address.parse(s3.put("taken", checkpoint))
    before = s3.keys("taken")
    with pytest.raises(CheckpointError, match=r"s3://models/taken/ is not empty.*model.safetensor"):
        upload(artifact, address)
    assert s3.keys("taken") == before
    with pytest.raises(OptionError, match="`publish` writes to S3"):
        convert(checkpoint, str(address))
