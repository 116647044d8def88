"""Ranged gets over boto3, each pinned to the object that was listed."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Any, Protocol

from lmi_multi.checkpoint.s3.address import Address
from lmi_multi.checkpoint.s3.client import code_of, failure, first_line
from lmi_multi.checkpoint.s3.listing import Object
from lmi_multi.errors import CheckpointError

logger = logging.getLogger(__name__)

PART = 16 * 2**20
BODY_ATTEMPTS = 5  # boto3 itself retries until an answer begins, but not when it breaks off
_BLOCK = 2**20
_LONGEST_PAUSE = 8.0

Sink = Callable[[int, bytes], None]
"""Takes bytes and their offset in the object."""


class Transport(Protocol):
    """A way to fetch ranges of objects; used by several threads at once.

    `part_size` are the bytes of one request, `threads` how many to make at a time.
    """

    part_size: int
    threads: int

    def get(self, item: Object, start: int, stop: int, sink: Sink) -> None:
        """Pass the bytes [start, stop) of `item` to `sink`, in order.

        Raises CheckpointError when the object changed or what comes is not what was asked for.
        """


class BotoTransport:
    """Plain boto3, one request a part."""

    def __init__(self, client: Any, address: Address, threads: int) -> None:
        self._client, self._address = client, address
        self.part_size, self.threads = PART, threads

    def get(self, item: Object, start: int, stop: int, sink: Sink) -> None:
        """See `Transport.get`. What broke off is resumed where it did."""
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        url = self._address.url(item.name)
        for attempt in range(1, BODY_ATTEMPTS + 1):
            try:
                body = self._open(item, start, stop)
            except ClientError as error:
                raise refused(self._client, self._address, item, error) from None
            except BotoCoreError as error:
                raise failure(error, url) from None
            try:
                while data := body.read(_BLOCK):
                    sink(start, data)
                    start += len(data)
                reason = "it ended early"
            except (BotoCoreError, HTTPError, ConnectionError, TimeoutError) as error:
                reason = first_line(error)
            finally:
                body.close()
            if start >= stop:
                return
            logger.info("%s broke off at byte %d: %s", url, start, reason)
            # Not evenly, so that many readers do not come back at the same moment.
            time.sleep(random.uniform(0, min(2.0 ** (attempt - 1), _LONGEST_PAUSE)))
        raise CheckpointError(
            f"{url} is truncated: bytes end at {start}, expected {stop}, after {BODY_ATTEMPTS} "
            f"attempts: {reason}"
        )

    def _open(self, item: Object, start: int, stop: int) -> Any:
        answer = self._client.get_object(
            Bucket=self._address.bucket,
            Key=self._address.key(item.name),
            Range=f"bytes={start}-{stop - 1}",
            IfMatch=item.etag,
        )
        check_range(self._address.url(item.name), answer.get("ContentRange"), item, start, stop)
        return answer["Body"]


def check_range(url: str, actual: str | None, item: Object, start: int, stop: int) -> None:
    """Raise CheckpointError unless the header Content-Range says what was asked for."""
    expected = f"bytes {start}-{stop - 1}/{item.size}"
    if actual != expected:
        raise CheckpointError(f"{url}: S3 sends {actual or 'no range'}, expected {expected}")


def refused(client: Any, address: Address, item: Object, error: Exception) -> CheckpointError:
    """What a refused get means: often that the object is not the listed one any more."""
    if code_of(error) not in ("PreconditionFailed", "412", "InvalidRange", "416", "NoSuchKey"):
        return failure(error, address.url(item.name))
    return CheckpointError(
        f"{address.url(item.name)} changed while it was read: expected ETag {item.etag} with "
        f"{item.size} bytes, now there is {_now(client, address, item)}; try again"
    )


def _now(client: Any, address: Address, item: Object) -> str:
    try:
        head = client.head_object(Bucket=address.bucket, Key=address.key(item.name))
    except Exception as error:  # only to say more: whatever comes here must not hide the first
        return "none" if code_of(error) in ("404", "NoSuchKey") else "another"
    return f"{head['ETag']} with {head['ContentLength']} bytes"
