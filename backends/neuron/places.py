"""Where a cache keeps its files: a folder, or a prefix on S3. Files appear there whole."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from lmi_multi.checkpoint.s3.address import Address, is_address
from lmi_multi.errors import CheckpointError, OptionError

_PARTIAL = ".partial"
ABANDONED_SECONDS = 3600.0
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def parse(where: str | Path) -> Address | Path:
    """`s3://BUCKET/PREFIX`, or a folder. Raises OptionError for a bad address, and for a URL of
    another scheme, which as a folder's name nobody means."""
    if is_address(where):
        return Address.parse(str(where))
    if isinstance(where, str) and _SCHEME.match(where):
        raise OptionError(f"cache is {where!r}, must be a folder or s3://BUCKET/PREFIX")
    return Path(where)


class Place(Protocol):
    """A set of files, and of places inside. Methods raise CheckpointError that names the file and
    the fault."""

    def inside(self, name: str) -> Place:
        """The place called `name` in this one, which need not be there yet."""

    def inner(self, start: str) -> list[str]:
        """The names of the places in this one that begin with `start`, in order."""

    def names(self) -> set[str]:
        """All files; none where there is no such place yet."""

    def read(self, name: str, most: int | None = None) -> bytes:
        """A whole file, or what of it is in its first `most` bytes."""

    def write(self, name: str, content: bytes) -> None:
        """Put a file there, or in the place of another, at one stroke."""


class Folder:
    """A `Place` on a disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def inside(self, name: str) -> Folder:
        """See `Place.inside`."""
        return Folder(self._folder / name)

    def inner(self, start: str) -> list[str]:
        """See `Place.inner`."""
        return sorted(path.name for path in self._folder.glob(f"{start}*") if path.is_dir())

    def names(self) -> set[str]:
        """See `Place.names`."""
        try:
            return {path.name for path in self._folder.iterdir() if not path.name.startswith(".")}
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise CheckpointError(f"{self._folder} cannot be read: {error.strerror}") from None

    def read(self, name: str, most: int | None = None) -> bytes:
        """See `Place.read`."""
        try:
            with (self._folder / name).open("rb") as file:
                return file.read(-1 if most is None else most)
        except OSError as error:
            raise CheckpointError(f"{self._folder / name} cannot be read: {error}") from None

    def write(self, name: str, content: bytes) -> None:
        """See `Place.write`."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            handle, partial = tempfile.mkstemp(_PARTIAL, f".{name}.", self._folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                Path(partial).chmod(0o644)
                Path(partial).replace(self._folder / name)
            finally:
                Path(partial).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self._folder / name} cannot be written: {error}") from None

    def _sweep(self) -> None:
        """Remove what processes left that were killed while they wrote."""
        for path in self._folder.glob(f".*{_PARTIAL}"):
            with suppress(OSError):  # another process sweeps too
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()


class Prefix:
    """A `Place` on S3: objects appear whole there by themselves."""

    def __init__(self, address: Address, client: Any = None) -> None:
        from lmi_multi.checkpoint.s3.client import make_client

        self._address, self._client = address, client or make_client()

    def __str__(self) -> str:
        return str(self._address)

    def inside(self, name: str) -> Prefix:
        """See `Place.inside`."""
        return Prefix(Address(self._address.bucket, self._address.key(name)), self._client)

    def inner(self, start: str) -> list[str]:
        """See `Place.inner`."""
        pages = self._client.get_paginator("list_objects_v2")
        below, found = self._address.start, []
        with self._failures(start):
            for page in pages.paginate(
                Bucket=self._address.bucket, Prefix=below + start, Delimiter="/"
            ):
                for folder in page.get("CommonPrefixes", ()):
                    found.append(folder["Prefix"].removeprefix(below).rstrip("/"))
        return sorted(found)

    def names(self) -> set[str]:
        """See `Place.names`."""
        from lmi_multi.checkpoint.s3.listing import list_folder

        return set(list_folder(self._client, self._address))

    def read(self, name: str, most: int | None = None) -> bytes:
        """See `Place.read`."""
        with self._failures(name):
            content: bytes = self._client.get_object(**self._where(name))["Body"].read(most)
            return content

    def write(self, name: str, content: bytes) -> None:
        """See `Place.write`."""
        with self._failures(name):
            self._client.put_object(**self._where(name), Body=content)

    def _where(self, name: str) -> dict[str, str]:
        return {"Bucket": self._address.bucket, "Key": self._address.key(name)}

    @contextmanager
    def _failures(self, name: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError

        from lmi_multi.checkpoint.s3.client import failure

        try:
            yield
        except (BotoCoreError, ClientError) as error:
            raise failure(error, self._address.url(name)) from None
