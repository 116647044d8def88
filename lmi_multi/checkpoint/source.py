"""Turns what a user names (a folder, a Hub id, the demo) into a local folder."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path

from lmi_multi.checkpoint import fastertransformer, hub
from lmi_multi.checkpoint.files import BIN_FILES, MANIFEST, SIDE_FILES, WEIGHT_FILES, matching
from lmi_multi.errors import CheckpointError, OptionError

DEMO = "demo"


@dataclass(frozen=True)
class Source:
    """A checkpoint or artifact on this machine.

    `name` is the Hub id, `demo`, or the folder's absolute path; `revision` is the Hub's commit, or
    a fingerprint of a local folder's files.
    """

    name: str
    folder: Path
    revision: str | None


def resolve(source: str | Path, revision: str | None = None) -> Source:
    """Find `source`: `demo`, a local folder, or a Hub id, in this order; the Hub downloads it.

    `revision` is a branch, tag or commit of the Hub. Raises CheckpointError, which tells where it
    was looked for, and OptionError for a revision of something that has none.
    """
    text = str(source)
    if not text.strip():
        raise OptionError("source is empty, must be a folder or a Hub id")
    if text.startswith("s3://"):
        return _s3(text)
    try:
        path = Path(text).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # too long a name; no such user after ~
        raise CheckpointError(f"{text:.80} is not a usable path: {error}") from None
    if path.is_dir() or (text == DEMO and not exists):
        if revision is not None:
            raise OptionError(f"revision is {revision!r}, but {text} is a local folder without any")
        return _demo() if not path.is_dir() else _local(path)
    if exists:
        raise CheckpointError(f"{text} is a file, expected the folder that holds the checkpoint")
    if isinstance(source, Path) or text.startswith(("/", "~", "./", "../")):
        raise CheckpointError(f"the folder {text} does not exist")
    folder = hub.download(text, revision)
    return Source(text, folder, folder.name)


def _s3(url: str) -> Source:
    """The one place where S3 sources belong."""
    raise CheckpointError(f"{url}: S3 sources are not supported yet; copy it to a local folder")


def _demo() -> Source:
    demo = importlib.import_module("lmi_multi.demo")
    folder = Path(demo.CHECKPOINT)
    if not folder.is_dir():
        raise CheckpointError(f"the demo model is not installed: {folder} does not exist")
    return Source(DEMO, folder, fingerprint(folder))


def _local(path: Path) -> Source:
    folder = path.resolve()
    return Source(str(folder), fastertransformer.find(folder) or folder, fingerprint(folder))


def fingerprint(folder: Path) -> str:
    """A local folder's revision: it changes with its files' names, sizes or times (in ns)."""
    digest = hashlib.sha256()
    raw = fastertransformer.find(folder)
    patterns = (*SIDE_FILES, *WEIGHT_FILES, *BIN_FILES, MANIFEST)
    for path in fastertransformer.files(raw) if raw else matching(folder, patterns):
        stat = path.stat()
        digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return f"local-{digest.hexdigest()[:16]}"
