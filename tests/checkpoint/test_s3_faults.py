"""S3 as it fails: what broke off goes on, what is wrong is named, and nothing wrong is loaded."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmi_multi.checkpoint.files import cache_dir
from lmi_multi.checkpoint.s3 import crt, pool, ranges, transports
from lmi_multi.checkpoint.s3 import download as downloading
from lmi_multi.checkpoint.s3.listing import Object
from lmi_multi.checkpoint.s3.parts import PartFile, journal_of
from lmi_multi.checkpoint.source import resolve
from lmi_multi.errors import CapacityError, CheckpointError

from .s3_server import BUCKET, SLOW_DOWN, Door, Fault, Request

PART = 4096
SIZE = 10 * PART + 5


@pytest.fixture
def url(s3: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder whose weights make eleven parts; what they hold does not matter here."""
    monkeypatch.setattr(ranges, "PART", PART)
    monkeypatch.setattr(crt, "PART", PART)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    monkeypatch.setattr(ranges, "_LONGEST_PAUSE", 0.01)
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(SIZE))
    return s3.put("m", folder)


def weights(door: Door) -> bytes:
    data: bytes = door.client.get_object(Bucket=BUCKET, Key="m/model.safetensors")["Body"].read()
    return data


def parts(door: Door) -> list[str | None]:
    return sorted(str(r.range) for r in door.data if r.name == "model.safetensors")


def is_weights(request: Request) -> bool:
    return request.is_data and request.name == "model.safetensors"


@pytest.fixture(params=["boto3", "crt"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "crt":
        pytest.importorskip("awscrt")
    monkeypatch.setenv("LMI_MULTI_S3", request.param)
    return str(request.param)


# Interrupted, and taken up again


def test_a_failed_download_goes_on(s3: Door, url: str, transport: str) -> None:
    last = f"bytes={10 * PART}-{SIZE - 1}"
    denied = Fault(403, b"<Error><Code>AccessDenied</Code></Error>")

    def fault(request: Request) -> Fault | None:
        if not is_weights(request) or request.range != last:
            return None
        deadline = time.monotonic() + 60
        while not finished() and time.monotonic() < deadline:  # some parts come before this fails
            time.sleep(0.02)
        return denied

    def finished() -> int:
        journals = list(cache_dir().glob("s3/*/partial/.model.safetensors.parts"))
        return len(journals[0].read_text().splitlines()) - 1 if journals else 0

    s3.fault = fault
    with pytest.raises(CheckpointError, match=r"^s3://models/m/model.safetensors: access denied"):
        resolve(url)
    kept = finished()
    assert 0 < kept < 11
    s3.fault = lambda request: None
    s3.requests.clear()
    seen: list[int] = []
    found = resolve(url, progress=lambda done, total, name: seen.append(done))
    assert (found.folder / "model.safetensors").read_bytes() == weights(s3)
    assert len([r for r in s3.data if is_weights(r)]) <= 11 - kept + 1  # and of this test's own
    assert seen[0] > kept * (PART - 1)
    assert sorted(p.name for p in found.folder.iterdir()) == ["config.json", "model.safetensors"]


KILLED = """
import os, signal, sys
from lmi_multi.checkpoint.s3 import ranges
from lmi_multi.checkpoint.s3.parts import PartFile
from lmi_multi.checkpoint.source import resolve

ranges.PART = int(sys.argv[2])
plain = PartFile.note

def note(self, start):
    last = plain(self, start)
    if self.item.size > 100 and len(self._done) >= 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return last

PartFile.note = note
resolve(sys.argv[1])
"""


def test_a_killed_download_goes_on(s3: Door, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", KILLED, url, str(PART)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (journal,) = cache_dir().glob("s3/*/partial/.model.safetensors.parts")
    kept = len(journal.read_text().splitlines()) - 1
    assert kept >= 6
    s3.requests.clear()
    found = resolve(url)
    assert len(parts(s3)) == 11 - kept and len(set(parts(s3))) == 11 - kept
    assert (found.folder / "model.safetensors").read_bytes() == weights(s3)
    assert not list(cache_dir().glob("s3/*/partial"))


def test_ctrl_c_stops_every_thread(s3: Door, url: str) -> None:
    interrupt = KeyboardInterrupt()
    pauses = threading.Event()

    def fault(request: Request) -> Fault | None:
        if is_weights(request) and request.range != f"bytes=0-{PART - 1}":
            pauses.wait(60)
        return None

    def progress(done: int, total: int, name: str) -> None:
        if name == "model.safetensors":
            pauses.set()
            raise interrupt

    s3.fault = fault
    with pytest.raises(KeyboardInterrupt):
        resolve(url, progress=progress)
    assert not [t for t in threading.enumerate() if t.name.startswith("s3")]
    s3.fault = lambda request: None
    assert (resolve(url).folder / "model.safetensors").read_bytes() == weights(s3)


def test_what_another_state_left_is_not_used(s3: Door, url: str) -> None:
    s3.fault = lambda r: Fault(403) if is_weights(r) and r.range == f"bytes=0-{PART - 1}" else None
    s3.client.put_object(Bucket=BUCKET, Key="m/tokenizer.json", Body=b"old")
    with pytest.raises(CheckpointError):
        resolve(url)
    s3.client.put_object(Bucket=BUCKET, Key="m/model.safetensors", Body=os.urandom(SIZE))
    s3.client.delete_object(Bucket=BUCKET, Key="m/tokenizer.json")
    s3.fault = lambda request: None
    s3.requests.clear()
    found = resolve(url)
    assert len(set(parts(s3))) == 11
    assert (found.folder / "model.safetensors").read_bytes() == weights(s3)
    assert sorted(p.name for p in found.folder.iterdir()) == ["config.json", "model.safetensors"]


ITEM = Object("x", 10, '"e"')


def test_journals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"

    def opened(item: Object = ITEM, size: int = 4) -> list[tuple[int, int]]:
        file = PartFile(path, item, size)
        file.close()
        return file.missing

    file = PartFile(path, ITEM, 4)
    assert file.missing == [(0, 4), (4, 8), (8, 10)]
    file.write(8, b"zz")
    assert not file.note(8)
    file.close()
    assert opened() == [(0, 4), (4, 8)]
    with journal_of(path).open("a") as journal:
        journal.write("1")  # cut off by a kill: without its end it counts for nothing
    assert opened() == [(0, 4), (4, 8)]
    assert path.read_bytes()[8:] == b"zz"
    assert opened(size=5) == [(0, 5), (5, 10)] and path.read_bytes() == bytes(10)
    for again in (Object("x", 10, '"f"'), Object("x", 12, '"e"')):
        file = PartFile(path, ITEM, 4)
        for start in (0, 4, 8):
            done = file.note(start)
        assert done
        file.close()
        assert len(opened(again)) == 3
    file = PartFile(path, ITEM, 4)
    file.note(0)
    file.close()
    assert opened() == [(4, 8), (8, 10)]
    monkeypatch.setattr("lmi_multi.checkpoint.s3.parts._boot", lambda: "after a crash")
    assert opened() == [(0, 4), (4, 8), (8, 10)]
    journal_of(path).write_bytes(b"\xff\n3\n")
    assert len(opened()) == 3


def test_empty_objects(s3: Door, url: str, transport: str) -> None:
    s3.client.put_object(Bucket=BUCKET, Key="m/merges.txt", Body=b"")
    assert (resolve(url).folder / "merges.txt").read_bytes() == b""


# Changed, cut, throttled, refused


def test_changed_while_it_was_read(s3: Door, url: str, transport: str) -> None:
    lock, new = threading.Lock(), os.urandom(SIZE + 1)
    left = [new]

    def fault(request: Request) -> Fault | None:
        with lock:  # all parts may have been asked for before the first one comes to here
            if left and is_weights(request) and len([r for r in s3.data if is_weights(r)]) >= 4:
                s3.client.put_object(Bucket=BUCKET, Key="m/model.safetensors", Body=left.pop())
        return None

    s3.fault = fault
    with pytest.raises(CheckpointError) as caught:
        resolve(url)
    assert str(caught.value).startswith(
        "s3://models/m/model.safetensors changed while it was read: expected ETag "
    )
    assert f"with {SIZE} bytes" in str(caught.value) and f"with {SIZE + 1} b" in str(caught.value)
    s3.fault = lambda request: None
    assert (resolve(url).folder / "model.safetensors").read_bytes() == new


def test_removed_while_it_was_read(s3: Door, url: str, transport: str) -> None:
    def fault(request: Request) -> Fault | None:
        if is_weights(request):
            s3.client.delete_object(Bucket=BUCKET, Key="m/model.safetensors")
        return None

    s3.fault = fault
    with pytest.raises(CheckpointError, match=r"changed while it was read.*now there is none"):
        resolve(url)


def test_a_cut_answer_is_resumed(s3: Door, url: str, transport: str) -> None:
    cut = [Fault(cut=100), Fault(cut=2000)]
    s3.fault = lambda r: (
        cut.pop() if cut and is_weights(r) and r.range and r.range.startswith("bytes=0-") else None
    )
    found = resolve(url)
    assert (found.folder / "model.safetensors").read_bytes() == weights(s3)
    assert transport == "crt" or f"bytes=2000-{PART - 1}" in parts(s3)


def test_an_object_that_is_always_cut(s3: Door, url: str) -> None:
    s3.fault = lambda r: Fault(cut=0) if r.range == f"bytes={PART}-{2 * PART - 1}" else None
    with pytest.raises(
        CheckpointError,
        match=rf"s3://models/m/model.safetensors is truncated: bytes end at {PART}, "
        rf"expected {2 * PART}, after 5 attempts: ",
    ):
        resolve(url)


def test_answers_that_are_no_range(s3: Door, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.fault = lambda r: Fault(200, b"x" * SIZE) if is_weights(r) else None
    with pytest.raises(CheckpointError, match=r"S3 sends no range, expected bytes \d+-\d+/40965"):
        resolve(url)


def test_throttling_is_sat_out(s3: Door, url: str, transport: str) -> None:
    left = [Fault(503, SLOW_DOWN)] * 2
    s3.fault = lambda r: left.pop() if left and r.method == "GET" else None
    assert (resolve(url).folder / "model.safetensors").read_bytes() == weights(s3)
    assert not left


def test_a_storm_ends(s3: Door, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transports, "THREADS", 2)  # each waits for its turn, as S3 wants it
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    s3.fault = lambda r: Fault(503, SLOW_DOWN) if r.is_data else None
    with pytest.raises(
        CheckpointError, match=r"S3 still answers 503 \(SlowDown\) after 2 attempts.*AWS_MAX_ATTEMP"
    ):
        resolve(url)


def answer(code: str, status: int = 403) -> Fault:
    return Fault(status, f"<Error><Code>{code}</Code><Message>words</Message></Error>".encode())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (answer("AccessDenied"), r"^s3://models/m: access denied \(ListObjectsV2\); reading needs"),
        (answer("ExpiredToken", 400), "^s3://models/m: S3 refuses the AWS credentials: ExpiredTok"),
        (answer("InvalidAccessKeyId"), "refuses the AWS credentials: InvalidAccessKeyId"),
        (answer("SomethingNew", 400), "^s3://models/m: S3 answers SomethingNew: words"),
    ],
)
def test_refusals(s3: Door, url: str, fault: Fault, message: str) -> None:
    s3.fault = lambda request: fault
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve(url)
    assert "\n" not in str(caught.value)


def test_no_such_bucket_or_folder(s3: Door, url: str) -> None:
    with pytest.raises(CheckpointError, match=r"^s3://nobody/m: there is no such bucket"):
        resolve("s3://nobody/m")
    with pytest.raises(CheckpointError, match=r"^s3://models/n/ holds no objects, expected"):
        resolve("s3://models/n")
    s3.client.put_object(Bucket=BUCKET, Key="n/README.md", Body=b"x")
    with pytest.raises(CheckpointError, match=r"^s3://models/n/ holds no weights:.*found README"):
        resolve("s3://models/n")


def test_no_credentials(s3: Door, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(CheckpointError, match="no AWS credentials were found; set AWS_PROFILE"):
        resolve(url)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(CheckpointError, match=r"S3 cannot be used: .*nobody"):
        resolve(url)


def test_nobody_answers(s3: Door, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"^s3://models/m: S3 cannot be reached: .*:9"):
        resolve(url)


# The disk


def test_too_little_space(s3: Door, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(free=2**20)
    monkeypatch.setattr(downloading, "shutil", SimpleNamespace(disk_usage=lambda path: free))
    with pytest.raises(CapacityError, match=r"has 1.00 MiB free, s3://models/m needs 0.04 MiB"):
        resolve(url)
    assert not s3.data


def test_a_full_disk_is_emptied(s3: Door, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pool.PartFile, "write", full)
    with pytest.raises(CapacityError, match=r"filled up, and what was downloaded is removed"):
        resolve(url)
    assert not list(cache_dir().glob("s3/*/partial"))


# Together


AT_ONCE = """
import sys
from lmi_multi.checkpoint.s3 import ranges
from lmi_multi.checkpoint.source import resolve

ranges.PART = int(sys.argv[2])
print((resolve(sys.argv[1]).folder / "model.safetensors").stat().st_size)
"""


def test_two_processes_download_once(s3: Door, url: str) -> None:
    command = [sys.executable, "-c", AT_ONCE, url, str(PART)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=240)[0] for process in both] == [f"{SIZE}\n"] * 2
    assert len(parts(s3)) == len(set(parts(s3))) == 11
    assert shutil.disk_usage(cache_dir()).total > 0 and transports.choice() in ("boto3", "crt")
