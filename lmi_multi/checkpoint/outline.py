"""A checkpoint without its data: what a local folder tells at once, and what remote ones must send.

Of each safetensors file on S3 or the Hub only the first bytes are fetched. They are written to a
local file of the full size, whose rest is a hole that takes no disk: everything that reads headers
and checks sizes works on it as on the real one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmi_multi.checkpoint import hub
from lmi_multi.checkpoint.files import BIN_FILES, MANIFEST, WEIGHT_FILES, matches
from lmi_multi.checkpoint.header import MAX_HEADER
from lmi_multi.checkpoint.s3 import listing
from lmi_multi.checkpoint.s3.address import Address, is_address
from lmi_multi.checkpoint.s3.client import failure, make_client
from lmi_multi.checkpoint.s3.listing import Object
from lmi_multi.checkpoint.s3.ranges import refused
from lmi_multi.checkpoint.source import Source, is_local, resolve
from lmi_multi.errors import CheckpointError

HEAD = 128 * 2**10  # most headers are shorter
_THREADS = 8
_TEXT = ("config.json", MANIFEST, "model.safetensors.index.json")

Fetch = Callable[[str, int, int], tuple[bytes, int]]
"""Takes a file's name and a range [start, stop); gives its bytes, and the size of the file."""


@contextmanager
def outlined(
    source: str | Path, revision: str | None = None, headers: bool = True
) -> Iterator[Source]:
    """A source whose folder serves headers, config and manifest, and no tensor's data.

    The folder of a remote one is temporary, and its tensors read as zeros; without `headers` these
    are not fetched either. Raises the errors of `resolve`, and, of headers, CheckpointError for a
    remote checkpoint that has only `.bin` weights.
    """
    if is_local(source) or (hub.is_offline() and not is_address(source)):
        yield resolve(source, revision)
        return
    name = str(Address.parse(str(source)) if is_address(source) else source)
    with tempfile.TemporaryDirectory(prefix="lmi_multi-") as folder:
        try:
            if is_address(source):
                yield _from_s3(Address.parse(name), Path(folder), headers)
            else:
                yield _from_hub(name, revision, Path(folder), headers)
        except CheckpointError as error:  # which may name the temporary folder
            raise type(error)(str(error).replace(folder, name)) from None


def _from_s3(address: Address, folder: Path, headers: bool) -> Source:
    client = make_client(_THREADS)
    objects = {o.name: o for o in listing.select(address, listing.list_folder(client, address))}

    def fetch(name: str, start: int, stop: int) -> tuple[bytes, int]:
        item = objects[name]
        return _s3_range(client, address, item, start, min(stop, item.size)), item.size

    _outline(str(address), folder, objects, fetch, address.url, headers)
    for item in objects.values():
        if not (folder / item.name).exists():
            _write(folder / item.name, b"", item.size)
    return Source(str(address), folder, listing.revision(objects.values()))


def _s3_range(client: Any, address: Address, item: Object, start: int, stop: int) -> bytes:
    from botocore.exceptions import BotoCoreError, ClientError

    if start >= stop:
        return b""
    try:
        answer = client.get_object(
            Bucket=address.bucket,
            Key=address.key(item.name),
            Range=f"bytes={start}-{stop - 1}",
            IfMatch=item.etag,
        )
        data: bytes = answer["Body"].read()
    except ClientError as error:
        raise refused(client, address, item, error) from None
    except BotoCoreError as error:
        raise failure(error, address.url(item.name)) from None
    return data


def _from_hub(repo: str, revision: str | None, folder: Path, headers: bool) -> Source:
    commit, names = hub.list_files(repo, revision)

    def fetch(name: str, start: int, stop: int) -> tuple[bytes, int]:
        return hub.read_range(repo, commit, name, start, stop)

    _outline(repo, folder, names, fetch, lambda name: f"{repo}/{name}", headers)
    return Source(repo, folder, commit)


def _check_kind(where: str, names: Collection[str]) -> None:
    if any(name.endswith(".safetensors") for name in names):
        return
    found = [name for name in names if matches(name, BIN_FILES)]
    what = f"only {found[0]}" if found else "none"
    raise CheckpointError(
        f"{where}: headers of remote weights are read from safetensors files, and there are "
        f"{what}; convert it to a local artifact first"
    )


def _outline(
    where: str,
    folder: Path,
    names: Collection[str],
    fetch: Fetch,
    url: Callable[[str], str],
    headers: bool,
) -> None:
    if headers:
        _check_kind(where, names)
    # A manifest tells by itself what the headers would.
    kinds = WEIGHT_FILES if headers and MANIFEST not in names else ()
    wanted = [name for name in names if matches(name, (*_TEXT, *kinds))]

    def one(name: str) -> None:
        data, size = fetch(name, 0, HEAD)
        end = _end(data, size) if name.endswith(".safetensors") else size
        if end > MAX_HEADER:
            raise CheckpointError(f"{url(name)}: header length is {end} bytes: not safetensors")
        if end > len(data):
            data += fetch(name, len(data), end)[0]
        if len(data) < end:
            raise CheckpointError(f"{url(name)}: {len(data)} bytes came, expected {end}")
        _write(folder / name, data[:end], size)

    with ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(one, wanted):
            pass


def _write(path: Path, data: bytes, size: int) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.truncate(size)


def _end(data: bytes, size: int) -> int:
    """Where a safetensors file's header ends; what is wrong with it is found when it is read."""
    return min(8 + int.from_bytes(data[:8], "little"), size) if len(data) >= 8 else len(data)
