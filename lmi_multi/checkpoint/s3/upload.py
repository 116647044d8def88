"""Writes an artifact to S3, so that a reader sees a whole one or none."""

from __future__ import annotations

import threading
from typing import Any

from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.files import MANIFEST, RANK_FILES, SIDE_FILES, listed, matches
from lmi_multi.checkpoint.s3.address import Address
from lmi_multi.checkpoint.s3.client import failure, make_client
from lmi_multi.checkpoint.s3.listing import Object, list_folder
from lmi_multi.checkpoint.writer import Progress
from lmi_multi.errors import CheckpointError

HASH = "sha256"  # the name under which an object's metadata tells it
_THREADS = 16


def upload(artifact: Artifact, address: Address, progress: Progress | None = None) -> None:
    """Put `artifact` into the folder `address`, the manifest last.

    An artifact that is there is replaced: its manifest goes first, so that there is none in
    between. Files that are there already, by size and sha256, are not sent again: an interrupted
    upload goes on. `progress` is called with bytes done, bytes in all, and the file's name.
    Raises CheckpointError; also when the folder holds anything but an artifact's files.
    """
    client = make_client(_THREADS)
    there = list_folder(client, address)
    _check_target(address, there)
    files = artifact.manifest.files
    job = _Job(client, address, artifact, progress)
    if MANIFEST in there:
        job.delete(MANIFEST)
    for name in files:
        job.send(name, there.get(name))
    for name in there:
        if name not in files and matches(name, (RANK_FILES,)):
            job.delete(name)
    job.send_manifest()


def _check_target(address: Address, there: dict[str, Object]) -> None:
    other = [n for n in sorted(there) if not matches(n, (MANIFEST, RANK_FILES, *SIDE_FILES))]
    if other:
        raise CheckpointError(
            f"{address}/ is not empty and holds other files than an artifact's: {listed(other)}; "
            "choose another prefix"
        )


class _Job:
    """One upload."""

    def __init__(
        self, client: Any, address: Address, artifact: Artifact, progress: Progress | None
    ) -> None:
        self.client, self.address, self.artifact = client, address, artifact
        self._progress, self._lock = progress, threading.Lock()
        self._done = 0
        self._total = sum(entry.size for entry in artifact.manifest.files.values())

    def send(self, name: str, there: Object | None) -> None:
        """Upload one file in parts, unless it is there."""
        from boto3.exceptions import S3UploadFailedError
        from botocore.exceptions import BotoCoreError, ClientError

        entry = self.artifact.manifest.files[name]
        where = {"Bucket": self.address.bucket, "Key": self.address.key(name)}
        try:
            if there is not None and there.size == entry.size:
                head = self.client.head_object(**where)
                if head.get("Metadata", {}).get(HASH) == entry.sha256:
                    self._tell(entry.size, name)
                    return
            self.client.upload_file(
                str(self.artifact.folder / name),
                **where,
                ExtraArgs={"Metadata": {HASH: entry.sha256}},
                Callback=lambda count: self._tell(count, name),
            )
        except S3UploadFailedError as error:
            # It wraps what S3 said in words of its own.
            raise failure(_cause(error), self.address.url(name)) from None
        except (BotoCoreError, ClientError) as error:
            raise failure(error, self.address.url(name)) from None

    def send_manifest(self) -> None:
        """Upload the manifest, which makes an artifact of the files."""
        body = (self.artifact.folder / MANIFEST).read_bytes()
        self._call("put_object", MANIFEST, Body=body, ContentType="application/json")

    def delete(self, name: str) -> None:
        """Remove one object."""
        self._call("delete_object", name)

    def _call(self, operation: str, name: str, **more: Any) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        where = {"Bucket": self.address.bucket, "Key": self.address.key(name)}
        try:
            getattr(self.client, operation)(**where, **more)
        except (BotoCoreError, ClientError) as error:
            raise failure(error, self.address.url(name)) from None

    def _tell(self, count: int, name: str) -> None:
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total, name)


def _cause(error: Exception) -> Exception:
    """What boto3's own error was made of."""
    inner = error.__cause__ or error.__context__
    return inner if isinstance(inner, Exception) else error
