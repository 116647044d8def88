"""Ranged gets, each pinned to the object that was listed, and resumed where they break off."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from threading import Event
from typing import Any, Protocol

from lmi_multi.checkpoint.s3.address import Address
from lmi_multi.checkpoint.s3.client import code_of, failure, first_line
from lmi_multi.checkpoint.s3.listing import Object
from lmi_multi.errors import CheckpointError

logger = logging.getLogger(__name__)

PART = 16 * 2**20
BODY_ATTEMPTS = 5  # clients themselves retry until an answer begins, but not when it breaks off
_BLOCK = 2**20
_LONGEST_PAUSE = 8.0
_CHANGED = ("PreconditionFailed", "412", "InvalidRange", "416", "NoSuchKey", "404")

Sink = Callable[[int, bytes], None]
"""Takes an offset in the object, and bytes."""


class BrokenOffError(Exception):
    """An answer began and did not end; str() says why."""


class StoppedError(Exception):
    """Another part failed, or the user interrupts."""


class Transport(Protocol):
    """A way to fetch ranges of objects; used by several threads at once.

    `part_size` are the bytes of one request, `threads` how many to make at a time. Once `stop` is
    set, no request begins any more.
    """

    part_size: int
    threads: int
    stop: Event

    def get(self, item: Object, start: int, stop: int, sink: Sink) -> None:
        """Pass the bytes [start, stop) of `item` to `sink`, in order.

        Raises CheckpointError when the object changed or what comes is not what was asked for,
        BrokenOffError when it ends early.
        """

    def url(self, item: Object) -> str:
        """The object in full, for messages."""


def fetch(transport: Transport, item: Object, start: int, stop: int, sink: Sink) -> None:
    """`Transport.get`, as often as it takes; raises CheckpointError when that is too often."""
    reason = ""
    position = start

    def counting(offset: int, data: bytes) -> None:
        nonlocal position
        if transport.stop.is_set():
            raise StoppedError
        sink(offset, data)
        position += len(data)

    for attempt in range(BODY_ATTEMPTS):
        # Not evenly, so that many readers do not come back at the same moment.
        if attempt and transport.stop.wait(random.uniform(0, min(2.0**attempt, _LONGEST_PAUSE))):
            raise StoppedError
        try:
            transport.get(item, position, stop, counting)
            reason = "it ended early"
        except BrokenOffError as error:
            reason = str(error)
        if position >= stop:
            return
        logger.info("%s broke off at byte %d: %s", transport.url(item), position, reason)
    raise CheckpointError(
        f"{transport.url(item)} is truncated: bytes end at {position}, expected {stop}, after "
        f"{BODY_ATTEMPTS} attempts: {reason}"
    )


class BotoTransport:
    """Plain boto3, one request a part."""

    def __init__(self, client: Any, address: Address, threads: int) -> None:
        self._client, self._address = client, address
        self.part_size, self.threads, self.stop = PART, threads, Event()
        # First of all handlers: another one waits while S3 throttles.
        client.meta.events.register_first("before-send.s3.GetObject", self._check_stop)

    def url(self, item: Object) -> str:
        """See `Transport.url`."""
        return self._address.url(item.name)

    def _check_stop(self, **_: Any) -> None:
        if self.stop.is_set():
            raise StoppedError

    def get(self, item: Object, start: int, stop: int, sink: Sink) -> None:
        """See `Transport.get`."""
        from botocore.exceptions import BotoCoreError, ClientError
        from urllib3.exceptions import HTTPError

        try:
            body = self._open(item, start, stop)
        except ClientError as error:
            raise refused(self._client, self._address, item, error) from None
        except BotoCoreError as error:
            raise failure(error, self.url(item)) from None
        try:
            while data := body.read(_BLOCK):
                sink(start, data)
                start += len(data)
        except (BotoCoreError, HTTPError, ConnectionError, TimeoutError) as error:
            raise BrokenOffError(first_line(error)) from None
        finally:
            body.close()

    def _open(self, item: Object, start: int, stop: int) -> Any:
        answer = self._client.get_object(
            Bucket=self._address.bucket,
            Key=self._address.key(item.name),
            Range=f"bytes={start}-{stop - 1}",
            IfMatch=item.etag,
        )
        check_range(self.url(item), answer.get("ContentRange"), item, start, stop)
        return answer["Body"]


def check_range(url: str, actual: str | None, item: Object, start: int, stop: int) -> None:
    """Raise CheckpointError unless the header Content-Range says what was asked for."""
    expected = f"bytes {start}-{stop - 1}/{item.size}"
    if actual != expected:
        raise CheckpointError(f"{url}: S3 sends {actual or 'no range'}, expected {expected}")


def refused(client: Any, address: Address, item: Object, error: Exception) -> CheckpointError:
    """What a refused get means: often that the object is not the listed one any more."""
    if code_of(error) not in _CHANGED:
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
