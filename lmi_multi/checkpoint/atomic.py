"""Puts a finished folder in place of another at one stroke.

A folder is filled under a hidden name beside its target, then renamed. An existing target is
exchanged with it by one system call (Linux). Where that is missing, the old folder steps aside
first: a kill between the two renames leaves no target, and `recover` brings the old one back.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from lmi_multi.errors import CheckpointError

_PARTIAL = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)-[0-9a-f]{8}\.partial")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_YOUNG_SECONDS = 60.0


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot sync folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


@contextmanager
def replacing(target: Path, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """A new folder to fill; when the block ends well it becomes `target`, else it is removed.

    An existing `target` must be an empty folder or satisfy `replaceable`; otherwise CheckpointError
    is raised before and after the block. Leftovers of killed processes are removed first. The
    folder is locked while it is filled, so that no other process takes it for such a leftover.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    remove_stale(target)
    _check_target(target, replaceable)
    partial = target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    partial.mkdir()
    lock = os.open(partial, os.O_RDONLY)
    try:
        with suppress(OSError):  # no locks here: then leftovers are never removed, which is safe
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield partial
        sync(partial)
        _publish(partial, target, replaceable)
        sync(target.parent)
    finally:
        # After an exchange the hidden name holds the old folder.
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _check_target(target: Path, replaceable: Callable[[Path], bool]) -> None:
    if not os.path.lexists(target) or replaceable(target):
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} exists and is no folder; choose another target")
    if any(target.iterdir()):
        raise CheckpointError(
            f"{target} is not empty and holds no artifact; choose another target or remove it"
        )


def _publish(partial: Path, target: Path, replaceable: Callable[[Path], bool]) -> None:
    for _ in range(100):  # another process may put its own folder there at the same time
        _check_target(target, replaceable)
        try:
            if target.is_dir() and any(target.iterdir()):
                _exchange(partial, target)
            else:
                partial.rename(target)  # also over an empty folder
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise
    raise CheckpointError(f"{target} keeps changing; is another process writing it?")


def _exchange(partial: Path, target: Path) -> None:
    """Swap two folders: atomically where the system can, else with a short gap."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return _step_aside(partial, target)
    result = rename(
        _AT_FDCWD, os.fsencode(partial), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE
    )
    code = ctypes.get_errno()
    if result == 0:
        return None
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return _step_aside(partial, target)
    raise OSError(code, os.strerror(code), str(target))


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.replaced"


def _step_aside(partial: Path, target: Path) -> None:
    aside = _aside(target)
    shutil.rmtree(aside, ignore_errors=True)
    target.rename(aside)
    partial.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def recover(target: Path) -> None:
    """Finish a replacement that was killed while the old folder had stepped aside."""
    aside = _aside(target)
    if not aside.is_dir():
        return
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.rename(target)


def remove_stale(target: Path) -> None:
    """Remove what killed processes left beside `target`."""
    for path in target.parent.glob(".*.partial"):
        match = _PARTIAL.fullmatch(path.name)
        if match and match["name"] == target.name and _abandoned(path, int(match["pid"])):
            shutil.rmtree(path, ignore_errors=True)


def _abandoned(path: Path, pid: int) -> bool:
    """No process holds the lock, nor is one about to take it.

    The lock also tells across containers, where process ids mean nothing.
    """
    try:
        if psutil.pid_exists(pid) and time.time() - path.stat().st_mtime < _YOUNG_SECONDS:
            return False
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True
