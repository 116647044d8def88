"""One process at a time does what others would repeat."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lmi_multi.checkpoint.files import cache_dir
from lmi_multi.errors import CheckpointError

logger = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Hold the lock beside `folder`, a folder of the cache; `doing` tells those who wait what for.

    The lock ends with its process, however that ends. Raises CheckpointError when the cache cannot
    be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f"{folder.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("waiting for another process that %s", doing)
            lock.acquire()
    except OSError as error:
        raise CheckpointError(
            f"the cache {cache_dir()} cannot be used: {error}; LMI_MULTI_CACHE names another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()
