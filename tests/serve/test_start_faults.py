"""Models that cannot be served: the server says why in one line, and ends with 1."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lmi_multi.checkpoint.files import MANIFEST
from tests.checkpoint.s3_server import BUCKET, SLOW_DOWN, Door, Fault, Request
from tests.serve.running import serving
from tests.tiny_models import artifact, checkpoint

WEIGHTS = "model.safetensors"


def failure(folder: Path, model: str, **environ: str) -> str:
    """The last line of a server that does not come up."""
    with serving(folder, model, **environ) as server:
        assert server.process.wait(120) == 1
        last = server.log.read_text().strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_no_model(tmp_path: Path) -> None:
    assert f"{tmp_path}/nothing" in failure(tmp_path, f"{tmp_path}/nothing")


def test_a_truncated_shard(tmp_path: Path) -> None:
    built = artifact(tmp_path, "gptneox").folder
    shard = max(built.glob("*.safetensors"))
    size = shard.stat().st_size
    os.truncate(shard, size - 100)
    last = failure(tmp_path, str(built))
    assert shard.name in last and str(size) in last and str(size - 100) in last


def test_an_altered_shard(tmp_path: Path) -> None:
    built = artifact(tmp_path, "gptneox").folder
    shard = max(built.glob("*.safetensors"))
    expected = json.loads((built / MANIFEST).read_text())["files"][shard.name]["sha256"]
    with shard.open("r+b") as opened:
        opened.seek(-3, os.SEEK_END)
        opened.write(b"abc")
    last = failure(tmp_path, str(built), OPTION_VERIFY="true")
    assert shard.name in last and expected in last


def test_a_config_that_disagrees_with_the_weights(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "gptneox")
    config = json.loads((folder / "config.json").read_text())
    wider = config["intermediate_size"] * 2
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": wider}))
    assert str(wider) in failure(tmp_path, str(folder))


def is_weights(request: Request) -> bool:
    return request.is_data and request.name == WEIGHTS


def test_an_object_on_s3_changes_in_mid_download(s3: Door, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "gptneox", tokenizer=True)
    url = s3.put("m", folder)
    throttled = [Fault(503, SLOW_DOWN)]
    data = (folder / WEIGHTS).read_bytes()
    new = [data + b"\0"]

    def fault(request: Request) -> Fault | None:
        if throttled:
            return throttled.pop()
        if is_weights(request) and new:
            s3.client.put_object(Bucket=BUCKET, Key=f"m/{WEIGHTS}", Body=new.pop())
        return None

    s3.fault = fault
    last = failure(tmp_path, url, LMI_MULTI_CACHE=str(tmp_path / "cache"))
    assert not throttled  # it had got over that
    assert f"s3://models/m/{WEIGHTS} changed while it was read: expected ETag" in last
    s3.client.put_object(Bucket=BUCKET, Key=f"m/{WEIGHTS}", Body=data)
    throttled.append(Fault(503, SLOW_DOWN))
    with serving(tmp_path, url, LMI_MULTI_CACHE=str(tmp_path / "cache")) as server:
        server.wait_ready()
        assert server.post("/invocations", {"inputs": "ten"}).status_code == 200


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_up(s3: Door, disk: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "gptneox")
    ballast = disk / "ballast"

    def fault(request: Request) -> None:
        if is_weights(request) and not ballast.exists():
            ballast.write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize))

    url = s3.put("m", folder)
    s3.fault = fault
    environment = {**os.environ, "LMI_MULTI_CACHE": str(disk), "OMP_NUM_THREADS": "1"}
    last = failure(tmp_path, url, LMI_MULTI_CACHE=str(disk))
    assert ballast.exists()
    assert "filled up, and what was downloaded is removed" in last and "MiB" in last
    assert not list(disk.rglob("*.safetensors"))
    # What is known to be too large is not even begun.
    command = [sys.executable, "-m", "lmi_multi", "convert", str(folder), str(disk / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "MiB free, the artifact needs" in done.stderr.strip().splitlines()[-1]
    assert not (disk / "out").exists()
    ballast.unlink()
    assert subprocess.run(command, capture_output=True, env=environment).returncode == 0


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "lmi_multi", "serve", "demo", "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    [line] = (done.stdout + done.stderr).splitlines()
    assert f"host 127.0.0.1 port {port} cannot be listened on: Address already in use" in line


def test_port_0_tells_its_port(tmp_path: Path) -> None:
    def ports() -> list[str]:
        return re.findall(r"serving demo on 127.0.0.1 port (\d+)", server.log.read_text())

    with serving(tmp_path, "demo", SAGEMAKER_BIND_TO_PORT="0") as server:
        server.until(ports)
        [port] = ports()
        answer = httpx.get(f"http://127.0.0.1:{port}/ping", timeout=30)
        assert answer.status_code in (200, 503)
