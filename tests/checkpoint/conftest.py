"""Checkpoints that several tests read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.convert import convert
from tests.moto_server import Moto

from . import s3_server
from .tiny import llama_state, write


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A fresh Llama checkpoint that the test may break."""
    return write(tmp_path / "checkpoint", llama_state())


@pytest.fixture
def artifact(checkpoint: Path, tmp_path: Path) -> Artifact:
    """That checkpoint in bf16, for two ranks."""
    return convert(checkpoint, tmp_path / "artifact", dtype="bf16", tensor_parallel=2)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LMI_MULTI_CACHE", str(folder))
    return folder


@pytest.fixture
def s3(aws: Moto, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3_server.Door]:
    """An empty S3 with one bucket, and a door before it that the environment names."""
    monkeypatch.delenv("LMI_MULTI_S3", raising=False)
    client = aws.client("s3")
    client.create_bucket(Bucket=s3_server.BUCKET)
    with s3_server.serve(aws.place, client) as door:
        monkeypatch.setenv("AWS_ENDPOINT_URL", door.url)
        yield door
