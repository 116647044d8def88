"""Downloads with the command s5cmd instead of boto3.

It is fast, but pins nothing and resumes nothing within a file: whoever calls it checks sizes, ETags
and hashes afterwards.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

from lmi_multi.checkpoint.s3.address import Address
from lmi_multi.checkpoint.s3.listing import Object
from lmi_multi.checkpoint.s3.parts import journal_of
from lmi_multi.checkpoint.writer import Progress
from lmi_multi.errors import CheckpointError

_THREADS = "16"  # of one object


def fetch(
    client: Any, address: Address, objects: list[Object], folder: Path, progress: Progress | None
) -> None:
    """Bring `objects` into `folder`, but those that came whole in an earlier attempt.

    `progress` is called for each object that has come. Raises CheckpointError with the last line
    that the command says.
    """
    missing = [item for item in objects if not _is_there(folder, item)]
    total = sum(item.size for item in objects)
    done = total - sum(item.size for item in missing)
    for item in missing:
        _run(client, address, item, folder)
        journal_of(folder / item.name).write_text(item.etag)
        done += item.size
        if progress is not None:
            progress(done, total, item.name)


def _is_there(folder: Path, item: Object) -> bool:
    path = folder / item.name
    try:
        return path.stat().st_size == item.size and journal_of(path).read_text() == item.etag
    except OSError:
        return False


def _run(client: Any, address: Address, item: Object, folder: Path) -> None:
    url = address.url(item.name)
    command = ["s5cmd", "--log", "error"]
    if not client.meta.endpoint_url.endswith(".amazonaws.com"):
        command += ["--endpoint-url", client.meta.endpoint_url]
    # Raw: an object's name may hold what the command takes for a pattern.
    command += ["cp", "--raw", "--concurrency", _THREADS, url, str(folder / item.name)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise CheckpointError(f"{shlex.join(command)}: {error.strerror}") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
        raise CheckpointError(
            f"{url}: s5cmd ended with {done.returncode} and said: {said[-1]:.200}"
        )
