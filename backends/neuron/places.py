"""Where a cache keeps its files: a folder, or a prefix on S3. Files appear there whole."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from lmi_multi.checkpoint.s3.address import Address
from lmi_multi.errors import CheckpointError

_PARTIAL = ".partial"
_ABANDONED_SECONDS = 3600.0


class Place(Protocol):
    """A flat set of files. Methods raise CheckpointError that names the file and the fault."""

    def names(self) -> set[str]:
        """All files; none where there is no such place yet."""

    def read(self, name: str) -> bytes:
        """A whole file."""

    def write(self, name: str, content: bytes) -> None:
        """Put a file there, or in the place of another, at one stroke."""


class Folder:
    """A `Place` on a disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def names(self) -> set[str]:
        """See `Place.names`."""
        try:
            return {path.name for path in self._folder.iterdir() if not path.name.startswith(".")}
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise CheckpointError(f"{self._folder} cannot be read: {error.strerror}") from None

    def read(self, name: str) -> bytes:
        """See `Place.read`."""
        try:
            return (self._folder / name).read_bytes()
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
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()


class Prefix:
    """A `Place` on S3: objects appear whole there by themselves."""

    def __init__(self, address: Address) -> None:
        from lmi_multi.checkpoint.s3.client import make_client

        self._address, self._client = address, make_client()

    def __str__(self) -> str:
        return str(self._address)

    def names(self) -> set[str]:
        """See `Place.names`."""
        from lmi_multi.checkpoint.s3.listing import list_folder

        return set(list_folder(self._client, self._address))

    def read(self, name: str) -> bytes:
        """See `Place.read`."""
        content: bytes = self._call("get_object", name)["Body"].read()
        return content

    def write(self, name: str, content: bytes) -> None:
        """See `Place.write`."""
        self._call("put_object", name, Body=content)

    def _call(self, operation: str, name: str, **more: Any) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        from lmi_multi.checkpoint.s3.client import failure

        where = {"Bucket": self._address.bucket, "Key": self._address.key(name)}
        try:
            return getattr(self._client, operation)(**where, **more)
        except (BotoCoreError, ClientError) as error:
            raise failure(error, self._address.url(name)) from None
