"""Brings a folder on S3 into the cache: in parallel, checked, and resumed where it broke off."""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmi_multi.checkpoint.artifact import read_manifest
from lmi_multi.checkpoint.atomic import sync
from lmi_multi.checkpoint.files import MANIFEST, cache_dir, gib
from lmi_multi.checkpoint.lock import locked
from lmi_multi.checkpoint.s3 import listing, s5cmd, transports
from lmi_multi.checkpoint.s3.address import Address
from lmi_multi.checkpoint.s3.client import make_client
from lmi_multi.checkpoint.s3.listing import Object
from lmi_multi.checkpoint.s3.parts import PartFile, journal_of
from lmi_multi.checkpoint.s3.pool import Pool
from lmi_multi.checkpoint.s3.ranges import Transport
from lmi_multi.checkpoint.share import Share
from lmi_multi.checkpoint.writer import Progress, sha256
from lmi_multi.errors import CapacityError, CheckpointError

logger = logging.getLogger(__name__)

_MARGIN = 2**20  # folders, journals and the file system's own blocks


@dataclass(frozen=True)
class Downloaded:
    """A local copy of a folder on S3; `revision` is the digest over its names, sizes, ETags."""

    folder: Path
    revision: str


def download(
    address: Address, share: Share | None = None, progress: Progress | None = None
) -> Downloaded:
    """Bring what a checkpoint or artifact needs into the cache, unless it is there already.

    With `share` that is what one rank needs, in a folder of its own. `progress` is called with
    bytes done, bytes in all, and the object's name; it counts what an earlier attempt brought.
    Raises CheckpointError, naming the object, what was expected and what came, and CapacityError.
    """
    choice = transports.choice()
    client = make_client(transports.THREADS, "s3v4" if choice == "crt" else None)
    objects = listing.select(address, listing.list_folder(client, address))
    if share is not None and not listing.is_shared(objects, share):
        share = None
    if share is not None:
        objects = listing.of_share(objects, share)
    place = _place(address, share)
    found = Downloaded(place / listing.revision(objects), listing.revision(objects))
    if _complete(found.folder, objects):
        return found
    with locked(place, f"downloads {address}"):
        if not _complete(found.folder, objects):  # by now another process may have brought it
            job = _Job(client, address, objects, share, place / "partial", progress)
            job.run(choice)
            shutil.rmtree(found.folder, ignore_errors=True)
            job.folder.rename(found.folder)
            sync(place)
    return found


def _place(address: Address, share: Share | None) -> Path:
    """The folder of everything that came from one address, or of one rank's share of it."""
    text = str(address) if share is None else f"{address} {share.rank} of {share.degree}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9._-]+", "--", f"{address.bucket}/{address.prefix}")
    return cache_dir() / "s3" / f"{readable.strip('.-')[-80:]}-{digest}"


def _complete(folder: Path, objects: list[Object]) -> bool:
    """Whether `folder` holds what was downloaded, with the sizes that it had."""
    if not folder.is_dir():
        return False
    sizes = {item.name: item.size for item in objects}
    wrong = [p.name for p in folder.iterdir() if p.stat().st_size != sizes.get(p.name)]
    needed = {item.name for item in objects}
    missing = []
    try:
        if (folder / MANIFEST).is_file():
            # The folder on S3 may hold files that the manifest does not name.
            needed &= {MANIFEST, *read_manifest(folder / MANIFEST).files}
        missing = [name for name in needed if not (folder / name).is_file()]
    except CheckpointError:
        wrong.append(MANIFEST)
    if wrong or missing:
        logger.warning("the download %s is damaged and will be repeated", folder)
    return not wrong and not missing


class _Job:
    """One download into `folder`, which may hold what an earlier attempt left."""

    def __init__(
        self,
        client: Any,
        address: Address,
        objects: list[Object],
        share: Share | None,
        folder: Path,
        progress: Progress | None,
    ) -> None:
        self.client, self.address, self.objects = client, address, objects
        self.share, self.folder, self.progress = share, folder, progress
        self.hashes: dict[str, str] = {}

    def run(self, choice: str) -> None:
        """Fetch, check and flush everything; a full disk is emptied again."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            transport = transports.ranged(choice, self.client, self.address)
            if listing.is_artifact_listing(self.objects):
                self._read_manifest(transport)
            self._remove_others()
            if choice == "s5cmd":
                rest = [item for item in self.objects if item.name != MANIFEST]
                s5cmd.fetch(self.client, self.address, rest, self.folder, self.progress)
                self._check_unpinned()
            else:
                self._fetch(transport, self.objects)
            for item in self.objects:
                journal_of(self.folder / item.name).unlink(missing_ok=True)
            sync(self.folder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise CheckpointError(f"{self.folder} cannot be written: {error}") from None
            shutil.rmtree(self.folder, ignore_errors=True)
            raise self._no_space() from None

    def _read_manifest(self, transport: Transport) -> None:
        """The manifest comes first: it says what else to fetch, and how to check it."""
        first = [item for item in self.objects if item.name == MANIFEST]
        self._fetch(transport, first, silent=True)
        try:
            manifest = read_manifest(self.folder / MANIFEST)
        except CheckpointError as error:
            reason = str(error).replace(str(self.folder / MANIFEST), self.address.url(MANIFEST))
            raise CheckpointError(reason) from None
        files = manifest.files if self.share is None else manifest.only((self.share.rank,))
        self.objects = listing.match_files(self.address, self.objects, files)
        self.hashes = {name: entry.sha256 for name, entry in files.items()}

    def _remove_others(self) -> None:
        """What an earlier attempt at another state of the folder left there."""
        wanted = [self.folder / item.name for item in self.objects]
        kept = {*wanted, *map(journal_of, wanted)}
        for path in self.folder.iterdir():
            if path not in kept:
                path.unlink()

    def _fetch(self, transport: Transport, objects: list[Object], silent: bool = False) -> None:
        with ExitStack() as stack:
            files = []
            for item in objects:
                files.append(PartFile(self.folder / item.name, item, transport.part_size))
                stack.callback(files[-1].close)
            self._check_space(sum(b - a for file in files for a, b in file.missing))
            pool = Pool(transport, self._check, None if silent else self.progress)
            pool.run(files)

    def _check(self, file: PartFile) -> None:
        """Called when a file is whole."""
        sync(file.path)
        self._check_hash(file.item)

    def _check_hash(self, item: Object) -> None:
        path, expected = self.folder / item.name, self.hashes.get(item.name)
        if expected is not None and (actual := sha256(path)) != expected:
            path.unlink()  # or the next attempt would take it for what it needs
            journal_of(path).unlink(missing_ok=True)
            raise CheckpointError(
                f"{self.address.url(item.name)} has sha256 {actual}, expected {expected} "
                f"by {MANIFEST}"
            )

    def _check_unpinned(self) -> None:
        """After a transport that pins nothing: everything is as it was listed before."""
        now = listing.list_folder(self.client, self.address)
        for item in self.objects:
            if now.get(item.name) != item:
                raise CheckpointError(f"{self.address.url(item.name)} changed while it was read")
            actual = (self.folder / item.name).stat().st_size
            if actual != item.size:
                raise CheckpointError(
                    f"{self.address.url(item.name)} came with {actual} bytes, expected {item.size}"
                )
            self._check_hash(item)

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed + _MARGIN:
            raise CapacityError(
                f"{self.folder} has {gib(free)} free, {self.address} needs {gib(needed)} more: "
                f"{gib(needed + _MARGIN - free)} are missing"
            )

    def _no_space(self) -> CapacityError:
        needed, free = sum(o.size for o in self.objects), shutil.disk_usage(cache_dir()).free
        return CapacityError(
            f"the disk of {cache_dir()} filled up, and what was downloaded is removed again: "
            f"{self.address} needs {gib(needed)}, now {gib(free)} are free"
        )
