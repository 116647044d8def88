"""Turns what a user names (a folder, a Hub id, a place on S3, the demo) into a local folder."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from lmi_multi.checkpoint import fastertransformer, hub
from lmi_multi.checkpoint.files import BIN_FILES, MANIFEST, SIDE_FILES, WEIGHT_FILES, matching
from lmi_multi.checkpoint.s3.address import Address, is_address
from lmi_multi.checkpoint.s3.download import download
from lmi_multi.checkpoint.share import Share
from lmi_multi.checkpoint.writer import Progress
from lmi_multi.errors import CheckpointError, OptionError

DEMO = "demo"


@dataclass(frozen=True)
class Source:
    """A checkpoint or artifact on this machine.

    `name` is the Hub id, the address on S3, `demo`, or the folder's absolute path; `revision` is
    the Hub's commit, or a fingerprint of the files, of local folders and of S3.
    """

    name: str
    folder: Path
    revision: str | None


def resolve(
    source: str | Path,
    revision: str | None = None,
    progress: Progress | None = None,
    share: Share | None = None,
) -> Source:
    """Find `source`: `s3://...`, a local folder, `demo`, or a Hub id; what is remote is downloaded.

    `revision` is a branch, tag or commit of the Hub. `progress` is called while a download from S3
    goes on; with `share` that leaves out what its rank does not need. Raises CheckpointError, which
    tells where it was looked for, CapacityError, and OptionError for a revision of something that
    has none.
    """
    text = str(source)
    if not isinstance(source, str | PathLike) or not text.strip():
        what = "empty" if isinstance(source, str) else f"{source!r:.80}"
        raise OptionError(f"source is {what}, must be a folder, s3://BUCKET/PREFIX or a Hub id")
    if is_address(source):
        return _s3(text, revision, progress, share)
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
    if is_local(source):
        raise CheckpointError(f"the folder {text} does not exist")
    folder = hub.download(text, revision)
    return Source(text, folder, folder.name)


def is_local(source: str | Path) -> bool:
    """Whether `source` needs no download: `resolve` finds it here, or says that it is wrong."""
    text = str(source)
    if is_address(source):
        return False
    if isinstance(source, Path) or not text.strip() or text == DEMO:
        return True
    try:
        return text.startswith(("/", "~", "./", "../")) or Path(text).exists()
    except OSError:  # too long a name
        return True


def _s3(url: str, revision: str | None, progress: Progress | None, share: Share | None) -> Source:
    address = Address.parse(url)
    if revision is not None:
        raise OptionError(f"revision is {revision!r}, but {address} is on S3, which has none")
    found = download(address, share, progress)
    return Source(str(address), found.folder, found.revision)


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
