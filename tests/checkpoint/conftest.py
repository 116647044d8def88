"""Checkpoints that several tests read."""

from __future__ import annotations

import http.client
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.convert import convert

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


@pytest.fixture(scope="session")
def moto() -> Iterator[tuple[tuple[str, int], Any]]:
    """moto's server on a free port, and a client that talks to it directly."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield (host, port), _client(f"http://{host}:{port}")
    server.stop()


@pytest.fixture
def s3(
    moto: tuple[tuple[str, int], Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[s3_server.Door]:
    """An empty S3 with one bucket, and credentials for it in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LMI_MULTI_S3", raising=False)
    place, client = moto
    link = http.client.HTTPConnection(*place, timeout=30)
    link.request("POST", "/moto-api/reset")
    assert link.getresponse().status == 200
    client.create_bucket(Bucket=s3_server.BUCKET)
    with s3_server.serve(place, client) as door:
        monkeypatch.setenv("AWS_ENDPOINT_URL", door.url)
        yield door


def _client(url: str) -> Any:
    import boto3

    return boto3.session.Session("test", "test", region_name="us-east-1").client(
        "s3", endpoint_url=url
    )
