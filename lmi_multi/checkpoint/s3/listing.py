"""What lies in a folder on S3, and which of it a checkpoint or an artifact needs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lmi_multi.checkpoint.artifact import FileEntry
from lmi_multi.checkpoint.files import (
    BIN_FILES,
    MANIFEST,
    RANK_FILES,
    SIDE_FILES,
    WEIGHT_FILES,
    listed,
    matches,
    plain_name,
)
from lmi_multi.checkpoint.s3.address import Address
from lmi_multi.checkpoint.s3.client import failure
from lmi_multi.checkpoint.share import Share
from lmi_multi.errors import CheckpointError

_RAW_FILES = ("config.ini", "*.bin")  # FasterTransformer's
_RANK = re.compile(r"rank-(\d+)-of-(\d+)\.safetensors")


@dataclass(frozen=True)
class Object:
    """One object by its name in the folder; `size` in bytes, `etag` as S3 quotes it."""

    name: str
    size: int
    etag: str


def list_folder(client: Any, address: Address) -> dict[str, Object]:
    """The objects directly in the folder, by name.

    Raises CheckpointError when it cannot be listed, or when a key would lead out of a folder.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    found: dict[str, Object] = {}
    pages = client.get_paginator("list_objects_v2")
    try:
        for page in pages.paginate(Bucket=address.bucket, Prefix=address.start, Delimiter="/"):
            for inner in page.get("CommonPrefixes", ()):
                _check_name(address, inner["Prefix"].removeprefix(address.start)[:-1], "/")
            for entry in page.get("Contents", ()):
                name = entry["Key"].removeprefix(address.start)
                if name:  # the folder's own marker, as consoles make it, has none
                    _check_name(address, name)
                    found[name] = Object(name, entry["Size"], entry["ETag"])
    except (BotoCoreError, ClientError) as error:
        raise failure(error, str(address)) from None
    return found


def _check_name(address: Address, name: str, end: str = "") -> None:
    """Refuse what no folder holds, used or not: whoever wrote such a key may mean harm."""
    if not plain_name(name):
        raise CheckpointError(
            f"{address}: the key {address.key(name) + end!r} leads out of the folder, "
            "expected plain file names"
        )


def select(address: Address, objects: dict[str, Object]) -> list[Object]:
    """The objects that a conversion or a load can need, sorted by name.

    That is as for the Hub: `.bin` weights only where there are no safetensors, and never Python
    files. Raises CheckpointError when there are no weights.
    """
    if not objects:
        raise CheckpointError(
            f"{address}/ holds no objects, expected those of a checkpoint or an artifact"
        )
    names = sorted(name for name in objects if not name.endswith(".py"))
    for mark, patterns in (
        ((MANIFEST,), (MANIFEST, RANK_FILES)),
        (WEIGHT_FILES, WEIGHT_FILES),
        (BIN_FILES, BIN_FILES),
        (_RAW_FILES[:1], _RAW_FILES),
    ):
        if any(matches(name, mark) for name in names):
            return [objects[n] for n in names if matches(n, (*patterns, *SIDE_FILES))]
    raise CheckpointError(
        f"{address}/ holds no weights: expected {MANIFEST}, {listed([*WEIGHT_FILES, *BIN_FILES])} "
        f"or {_RAW_FILES[0]}; found {listed(sorted(objects))}"
    )


def is_artifact_listing(objects: Iterable[Object]) -> bool:
    """Whether these are an artifact's objects."""
    return any(item.name == MANIFEST for item in objects)


def of_share(objects: Iterable[Object], share: Share) -> list[Object]:
    """`objects` without the weights that other ranks of the same degree need alone."""
    return [o for o in objects if not (rank := _rank(o, share)) or int(rank) == share.rank]


def is_shared(objects: Iterable[Object], share: Share) -> bool:
    """Whether these are an artifact's of the share's degree."""
    return any(_rank(item, share) for item in objects)


def _rank(item: Object, share: Share) -> str | None:
    """The rank, as it is written, that a file of the share's degree belongs to."""
    found = _RANK.fullmatch(item.name)
    return found[1] if found and int(found[2]) == share.degree else None


def revision(objects: Iterable[Object]) -> str:
    """A digest over names, sizes and ETags: another one when anything in the folder changes."""
    digest = hashlib.sha256()
    for item in objects:
        digest.update(f"{item.name}\0{item.size}\0{item.etag}\0".encode())
    return f"s3-{digest.hexdigest()[:16]}"


def match_files(
    address: Address, objects: list[Object], files: Mapping[str, FileEntry]
) -> list[Object]:
    """The objects of an artifact's `files`, and its manifest.

    Raises CheckpointError where one is missing or has not the size that the manifest tells.
    """
    by_name = {item.name: item for item in objects}
    for name, entry in files.items():
        if name not in by_name:
            raise CheckpointError(f"{address.url(name)} is missing, expected by {MANIFEST}")
        if by_name[name].size != entry.size:
            raise CheckpointError(
                f"{address.url(name)} has {by_name[name].size} bytes, expected {entry.size} "
                f"by {MANIFEST}"
            )
    return [item for item in objects if item.name in files or item.name == MANIFEST]
