"""Names, places and sizes of files, as every module of this folder sees them."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path, PurePosixPath

from platformdirs import user_cache_dir

from lmi_multi.errors import CheckpointError

MANIFEST = "lmi_multi.json"
# What an artifact carries beside the weights. Python files are never copied nor run.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
)
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")
RANK_FILES = "rank-*-of-*.safetensors"  # an artifact's
BIN_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def cache_dir() -> Path:
    """Where downloads and converted artifacts are kept: $LMI_MULTI_CACHE, or the user's cache."""
    return Path(os.environ.get("LMI_MULTI_CACHE") or user_cache_dir("lmi_multi")).expanduser()


def matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files directly in `folder` whose name matches one of `patterns`, sorted by name.

    Raises CheckpointError when the folder cannot be listed.
    """
    try:
        return sorted(
            path
            for path in folder.iterdir()
            if path.is_file() and not path.name.endswith(".py") and matches(path.name, patterns)
        )
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from None


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether `name` matches one of the shell-style `patterns`, case-sensitively."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def plain_name(name: str) -> bool:
    """Whether `name` is a file name and nothing else: no folder, no `..`, no NUL."""
    return (
        name not in ("", ".", "..")
        and PurePosixPath(name).name == name
        and "\\" not in name
        and "\0" not in name
    )


def gib(size: int) -> str:
    """`size` bytes for a reader: GiB, or MiB when below 0.1 GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 // 10 else f"{size / 2**20:.2f} MiB"


def listed(names: list[str], limit: int = 5) -> str:
    """The first `limit` of `names`, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def file_size(path: Path) -> int:
    """The size of a regular file in bytes. Raises CheckpointError when there is none."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        return path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
