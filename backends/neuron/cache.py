"""Compiled graphs kept for later: in a folder, usually the artifact's, or on S3.

An entry is one file: a line of JSON that says what it is, and the bytes that a runtime's compiler
made. It appears whole or not at all. Its name holds a hash of everything the bytes depend on, so
an entry that is found is the right one; one for the same graph under another name is stale, or
somebody else's, and is named in a warning instead of used.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmi_multi.checkpoint.s3.address import Address
from lmi_multi.errors import LmiError

from .places import Folder, Place, Prefix, parse
from .program import Toolchain

logger = logging.getLogger(__name__)

SUFFIX = ".graph"
FORMAT_VERSION = 1
_HEADER_BYTES = 2**16


@dataclass(frozen=True)
class Key:
    """What an entry is for: a graph's tag and digest (see `program.Lowered`), and a toolchain."""

    tag: str
    digest: str
    toolchain: Toolchain

    @property
    def name(self) -> str:
        """The entry's file name."""
        whole = json.dumps(
            [FORMAT_VERSION, self.digest, self.toolchain.__dict__], sort_keys=True, default=dict
        )
        return f"{self.tag}-{hashlib.sha256(whole.encode()).hexdigest()[:16]}{SUFFIX}"


class Header(BaseModel):
    """The first line of an entry. `size` and `sha256` are those of the bytes after it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format_version: int
    tag: str
    digest: str
    runtime: str
    versions: dict[str, str]
    flags: str
    size: Annotated[int, Field(ge=0)]
    sha256: str

    def differences(self, key: Key) -> Iterator[str]:
        """In what this entry is not for `key`, one phrase each."""
        wanted = key.toolchain
        if self.runtime != wanted.runtime:
            yield f"is for the runtime {self.runtime}, not {wanted.runtime}"
            return
        for package in sorted({*self.versions, *wanted.versions}):
            theirs, ours = self.versions.get(package), wanted.versions.get(package)
            if theirs != ours:
                yield f"was compiled with {package} {theirs or 'absent'}, here is {ours or 'none'}"
        if self.flags != wanted.flags:
            yield f"has the flags {self.flags!r}, not {wanted.flags!r}"
        if self.digest != key.digest:
            yield "is of another graph: other limits, or another version of lmi_multi"


class Cache:
    """Entries at one place. Threads may share it."""

    def __init__(self, outer: Place, inner: str, model: str = "") -> None:
        self._outer, self._inner, self._model = outer, inner, model
        self._place = outer.inside(inner)
        self._names = self._place.names()

    @classmethod
    def at(cls, where: str | Path, inner: str, model: str = "") -> Cache:
        """The cache in the folder `inner` of `where`, a folder or `s3://BUCKET/PREFIX`; those of
        the same model for other sizes begin with `model`. Raises OptionError for a bad address,
        CheckpointError when it cannot be listed."""
        place = parse(where)
        return cls(Prefix(place) if isinstance(place, Address) else Folder(place), inner, model)

    def __str__(self) -> str:
        return str(self._place)

    def find(self, key: Key) -> bytes | None:
        """The bytes for `key`, or None. Entries of the same tag that do not serve are named in
        warnings."""
        if key.name not in self._names:
            for name in self._others(key):
                self._warn(name, self._why_not(name, key))
            return None
        try:
            header, binary = _unpack(self._place.read(key.name))
        except ValueError as error:
            self._warn(key.name, str(error))
            return None
        if different := "; ".join(header.differences(key)):  # somebody has renamed it
            self._warn(key.name, different)
            return None
        return binary

    def tell_others(self) -> None:
        """Log which folders beside this one have the model's graphs for other sizes: none serves,
        as somebody may have meant."""
        try:
            found = self._outer.inner(self._model) if self._model else []
        except LmiError:
            return  # it is but a hint
        others = [name for name in found if name != self._inner]
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            where = f"{self._outer}/{others[0]}{more}"
            logger.info("graphs of the same model for other sizes are not used: %s", where)

    def put(self, key: Key, binary: bytes) -> None:
        """Keep `binary` for `key`. Raises CheckpointError when the place cannot be written."""
        header = Header(
            format_version=FORMAT_VERSION,
            tag=key.tag,
            digest=key.digest,
            runtime=key.toolchain.runtime,
            versions=dict(key.toolchain.versions),
            flags=key.toolchain.flags,
            size=len(binary),
            sha256=hashlib.sha256(binary).hexdigest(),
        )
        self._place.write(key.name, header.model_dump_json().encode() + b"\n" + binary)

    def _warn(self, name: str, why: str) -> None:
        logger.warning("%s/%s %s: not used", self, name, why)

    def _others(self, key: Key) -> list[str]:
        """Names that differ from the key's in nothing but the hash."""
        same = key.tag + "-"
        return [n for n in sorted(self._names) if n.startswith(same) and n.endswith(SUFFIX)]

    def _why_not(self, name: str, key: Key) -> str:
        try:
            header = _header(self._place.read(name, _HEADER_BYTES).partition(b"\n")[0])
        except (ValueError, LmiError) as error:
            return str(error)
        return "; ".join(header.differences(key)) or "bears another name than its content has"


def _unpack(entry: bytes) -> tuple[Header, bytes]:
    """A whole entry's parts. Raises ValueError that says, after a name, what is wrong."""
    line, _, binary = entry.partition(b"\n")
    header = _header(line)
    if len(binary) != header.size:
        raise ValueError(f"has {len(binary)} bytes of a graph, expected {header.size}")
    if hashlib.sha256(binary).hexdigest() != header.sha256:
        raise ValueError("has another sha256 than when it was written")
    return header, binary


def _header(line: bytes) -> Header:
    """Raises ValueError."""
    try:
        return Header.model_validate_json(line)
    except ValidationError:
        raise ValueError("is no compiled graph, or of another version of lmi_multi") from None
