"""Converts a source once, and finds the artifact again."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path

from lmi_multi.checkpoint.artifact import FORMAT_VERSION, Artifact, is_artifact
from lmi_multi.checkpoint.convert import check_options, convert
from lmi_multi.checkpoint.files import cache_dir
from lmi_multi.checkpoint.lock import locked
from lmi_multi.checkpoint.share import Share
from lmi_multi.checkpoint.source import Source, resolve
from lmi_multi.checkpoint.writer import Progress
from lmi_multi.errors import CheckpointError, OptionError

logger = logging.getLogger(__name__)


def open_or_convert(
    source: str | Path | Source,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
    tensor_parallel: int = 1,
    rank: int | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Open `source` when it is an artifact; else convert it into the cache once, and open that.

    The options are those of `convert`; `progress` tells of a download too; `verify` also checks
    every file's sha256. A cached artifact that is broken is converted again.

    `rank` is for a process that runs one of the ranks, as torchrun's do: of an artifact that has
    files for `tensor_parallel` only this rank's are fetched from S3, checked, and can be loaded.

    Raises OptionError when an artifact has another dtype or quantization than asked for, and
    whatever `convert` and `Artifact.open` raise.
    """
    check_options(dtype, quantize, tensor_parallel)
    share = None if rank is None else Share(rank, tensor_parallel)
    found = source if isinstance(source, Source) else resolve(source, revision, progress, share)
    if is_artifact(found.folder):
        artifact = Artifact.open_share(found.folder, share, verify)
        _check_same(artifact, dtype, quantize)
        return artifact
    folder = entry_folder(found, dtype, quantize, tensor_parallel)
    return _cached(folder, verify, logging.DEBUG) or _convert_locked(
        found, folder, dtype, quantize, tensor_parallel, verify, progress
    )


def entry_folder(source: Source, dtype: str, quantize: str | None, degree: int) -> Path:
    """The cache's folder for one source and one set of options."""
    key = [source.name, source.revision, dtype, quantize, degree, FORMAT_VERSION]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    last = source.name if not Path(source.name).is_absolute() else Path(source.name).name
    readable = re.sub(r"[^A-Za-z0-9._-]+", "--", last).strip(".-")[:80] or "model"
    return cache_dir() / "artifacts" / f"{readable}-{digest}"


def _check_same(artifact: Artifact, dtype: str, quantize: str | None) -> None:
    for name, asked, actual in (
        ("dtype", None if dtype == "auto" else dtype, artifact.dtype),
        ("quantize", quantize, artifact.quantize),
    ):
        if asked is not None and asked != actual:
            raise OptionError(
                f"{name} is {asked!r}, but the artifact {artifact.folder} was converted with "
                f"{actual!r}; convert its source again"
            )


def _cached(folder: Path, verify: bool, level: int) -> Artifact | None:
    """The cache's entry; None when there is none, or a broken one, which is logged at `level`."""
    if not is_artifact(folder):
        return None
    try:
        return Artifact.open(folder, verify)
    except CheckpointError as error:
        logger.log(level, "cached artifact is broken and will be converted again: %s", error)
        return None


def _convert_locked(
    source: Source,
    folder: Path,
    dtype: str,
    quantize: str | None,
    degree: int,
    verify: bool,
    progress: Progress | None,
) -> Artifact:
    """Convert while no other process does; what that one made in the meantime is taken."""
    with locked(folder, f"converts {source.name}"):
        artifact = _cached(folder, verify, logging.WARNING)
        if artifact is not None:
            return artifact
        if folder.exists() and not is_artifact(folder):
            shutil.rmtree(folder, ignore_errors=True)
        return convert(
            source,
            folder,
            dtype=dtype,
            quantize=quantize,
            tensor_parallel=degree,
            progress=progress,
        )
