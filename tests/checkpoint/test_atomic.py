"""Replacing folders: killed at any moment, the target is as it was, or new."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmi_multi.checkpoint import atomic
from lmi_multi.checkpoint.artifact import Artifact, is_artifact
from lmi_multi.checkpoint.atomic import replacing
from lmi_multi.checkpoint.convert import convert
from lmi_multi.errors import CheckpointError

DEAD = 2**22 + 7  # above the largest process id
KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.convert import convert

torch.set_num_threads(1)
source, target = Path(sys.argv[1]), Path(sys.argv[2])
random.seed(int(sys.argv[3]))
took = 10.0
for _ in range(4):  # the first one warms up, and any of them may be held up
    start = time.monotonic()
    convert(source, f"{target}-warm")
    took = min(took, time.monotonic() - start)
seen, attempt = set(), 0
while attempt < 40 or (len(seen) < 2 and attempt < 400):
    attempt += 1
    child = os.fork()
    if child == 0:
        if attempt % 3 == 0:  # a free target, too
            os.path.exists(target) and target.rename(f"{target}-{attempt}")
        while True:
            for dtype in ("fp32", "bf16"):
                convert(source, target, dtype=dtype)
    time.sleep(random.uniform(0.0, 4 * took))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if target.exists():
        seen.add(Artifact.open(target, verify_hashes=True).dtype)
    else:
        seen.add(None)
convert(source, target, dtype="fp16")
assert Artifact.open(target, verify_hashes=True).dtype == "fp16"
print(*seen)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_killed_at_any_moment(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "artifact"
    result = subprocess.run(
        [sys.executable, "-c", KILLS, str(checkpoint), str(target), "0"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    seen = set(result.stdout.split())
    assert len(seen) >= 2 and seen <= {"None", "bf16", "fp32"}
    assert all(not name.startswith(".") for name in names(tmp_path / "out"))


def fill(target: Path, text: str) -> None:
    with replacing(target, lambda path: (path / "mark").is_file()) as partial:
        (partial / "mark").write_text(text)


@pytest.fixture(params=["exchange", "no call", "no support"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without an atomic exchange."""

    class Library:
        def __init__(self, *args: object, **options: object) -> None:
            if request.param == "no support":
                self.renameat2 = lambda *args: -1

    if request.param != "exchange":
        monkeypatch.setattr(ctypes, "CDLL", Library)
        monkeypatch.setattr(ctypes, "get_errno", lambda: errno.EINVAL)


@pytest.mark.usefixtures("system")
def test_replaces_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    for text in ("one", "two", "three"):
        fill(target, text)
        assert (target / "mark").read_text() == text
        assert names(tmp_path / "deep") == ["target"]


@pytest.mark.usefixtures("system")
def test_failure_leaves_the_target(tmp_path: Path) -> None:
    target = tmp_path / "target"
    fill(target, "one")
    with pytest.raises(KeyboardInterrupt), replacing(target, lambda path: True) as partial:
        (partial / "mark").write_text("two")
        raise KeyboardInterrupt
    assert (target / "mark").read_text() == "one" and names(tmp_path) == ["target"]


def test_kill_between_two_renames_is_recovered(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "artifact"
    convert(checkpoint, target)
    target.rename(atomic._aside(target))
    assert Artifact.open(target).dtype == "fp32"
    assert not atomic._aside(target).exists()
    convert(checkpoint, atomic._aside(target), dtype="bf16")  # killed before its removal
    assert Artifact.open(target).dtype == "fp32"
    assert not atomic._aside(target).exists()


@pytest.mark.parametrize("kind", ["full", "file", "link"])
def test_refuses_what_is_no_artifact(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "full":
        target.mkdir()
        (target / "thesis.txt").write_text("years of work")
    elif kind == "file":
        target.write_text("years of work")
    else:
        target.symlink_to(checkpoint)
    before = names(checkpoint)
    with pytest.raises(CheckpointError, match=r"is not empty and holds no artifact|is no folder"):
        convert(checkpoint, target)
    assert names(tmp_path) == ["checkpoint", "target"] and names(checkpoint) == before


def test_empty_folder_and_link_to_an_artifact(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    convert(checkpoint, target)
    link = tmp_path / "link"
    link.symlink_to(target)
    convert(checkpoint, link, dtype="bf16")
    assert link.is_symlink() and Artifact.open(target).dtype == "bf16"
    assert names(tmp_path) == ["checkpoint", "link", "target"]


def test_relative_target_and_source_folder_as_parent(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint)
    assert is_artifact(convert(".", "inside").folder)
    assert names(checkpoint) == ["config.json", "inside", "model.safetensors"]


def partial(target: Path, pid: int) -> Path:
    folder = target.parent / f".{target.name}.{pid}-0123abcd.partial"
    folder.mkdir()
    (folder / "data").touch()
    return folder


def test_leftovers_of_the_dead_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    dead = partial(target, DEAD)
    other = partial(tmp_path / "target2", DEAD)
    alive = partial(target, os.getpid())
    old = partial(target, os.getppid())
    os.utime(old, (time.time() - 3600,) * 2)  # the id was given to another process since
    fill(target, "one")
    assert not dead.exists() and not old.exists()
    assert other.exists() and alive.exists()


def test_a_locked_leftover_is_alive(tmp_path: Path) -> None:
    target = tmp_path / "target"
    elsewhere = partial(target, DEAD)  # a process of another container
    handle = os.open(elsewhere, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    fill(target, "one")
    assert elsewhere.exists()
    os.close(handle)
    fill(target, "two")
    assert not elsewhere.exists()


def test_another_process_finishes_first(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with replacing(target, lambda path: (path / "mark").is_file()) as folder:
        (folder / "mark").write_text("slow")
        fill(target, "fast")
    assert (target / "mark").read_text() == "slow" and names(tmp_path) == ["target"]


def test_a_target_that_appears_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with (
        pytest.raises(CheckpointError, match="holds no artifact"),
        replacing(target, lambda path: False) as folder,
    ):
        (folder / "mark").touch()
        target.mkdir()
        (target / "thesis.txt").touch()
    assert names(tmp_path) == ["target"] and names(target) == ["thesis.txt"]
