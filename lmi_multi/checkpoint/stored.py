"""What the cache holds: downloads from S3, and artifacts that were converted."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from lmi_multi.checkpoint.files import cache_dir
from lmi_multi.checkpoint.lock import locked
from lmi_multi.errors import CheckpointError

_DEPTHS = {"s3": 2, "artifacts": 1}
"""Folders of the cache, and how far below each its entries are: a download stands below its
address, by the state that was downloaded."""


@dataclass(frozen=True)
class Entry:
    """One folder of the cache. `name` is its path there; `nbytes` its files' size; `made` when it
    came, in seconds since 1970."""

    name: str
    nbytes: int
    made: float


def entries() -> list[Entry]:
    """All of them, the largest first. What another process removes meanwhile is left out."""
    found = [
        _entry(path)
        for kind, depth in _DEPTHS.items()
        for path in (cache_dir() / kind).glob("/".join("*" * depth))
        if path.is_dir() and not path.name.startswith(".")  # what is just being written
    ]
    return sorted(found, key=lambda entry: (-entry.nbytes, entry.name))


def _entry(folder: Path) -> Entry:
    sizes = [path.lstat().st_size for path in folder.rglob("*") if path.is_file()]
    name = folder.relative_to(cache_dir()).as_posix()
    return Entry(name, sum(sizes), folder.stat().st_mtime)


def remove(name: str) -> int:
    """Remove an entry, once nobody downloads or converts it; returns the bytes that this frees.

    A process that has loaded it goes on; one that is about to open it gets an error. Raises
    CheckpointError if there is no such entry, or it cannot be removed.
    """
    if name not in {entry.name for entry in entries()}:
        raise CheckpointError(f"the cache {cache_dir()} holds no {name!r:.200}")
    folder = cache_dir() / name
    of_download = name.startswith("s3/")
    with locked(folder.parent if of_download else folder, f"writes {name}"):
        size = _entry(folder).nbytes
        try:
            shutil.rmtree(folder)
            if of_download and not any(folder.parent.iterdir()):
                folder.parent.rmdir()
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be removed: {error.strerror}") from None
    return size
