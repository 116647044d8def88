"""What the engine has answered and the server has not passed on yet, one request at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from lmi_multi.serve.failures import LateError
from lmi_multi.streaming import Chunk

MAX_UNREAD = 4 * 2**20
"""About as many bytes of a stream may wait for a client that is slower than the engine."""
MAX_SCRIPT_UNREAD = 64 * 2**20
"""As many of a script's, whose parts may be of any size and come as fast as it makes them."""
_ENTRY = 128  # bytes that a chunk takes, and each token and log-probability in it


class Inbox:
    """Answers in their order: chunks, a list of vectors, a message of a script, or an exception to
    raise. `limit`: the bytes that may wait, where a client's pace decides on it."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._answers: asyncio.Queue[tuple[Any, int]] = asyncio.Queue()
        self._unread = 0

    @property
    def is_full(self) -> bool:
        """Whether more bytes wait than may."""
        return self.limit is not None and self._unread > self.limit

    def put(self, answer: Any, size: int = 0) -> None:
        """Add one, of about `size` bytes."""
        self._unread += size
        self._answers.put_nowait((answer, size))

    def fail(self, error: BaseException) -> None:
        """Let `error` be the next that comes; what has not been taken is dropped."""
        while not self._answers.empty():
            self._answers.get_nowait()
        self._unread = 0
        self.put(error)

    async def next(self) -> Any:
        """Wait for the next one. Raises the exception that it is."""
        answer, size = await self._answers.get()
        self._unread -= size
        if isinstance(answer, BaseException):
            raise answer
        return answer

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """LateError comes after so long. Not asyncio.wait_for: before Python 3.12 that loses a
        cancellation that comes with an answer."""
        late = LateError(f"no whole answer within {seconds:g} s")
        timer = asyncio.get_running_loop().call_later(seconds, self.put, late)
        try:
            yield
        finally:
            timer.cancel()


def size_of(chunks: Iterable[Chunk]) -> int:
    """About how many bytes these take."""
    entries = 0
    for chunk in chunks:
        entries += 1 + len(chunk.token_ids)
        entries += sum(1 + len(entry.top) for entry in chunk.logprobs or ())
    return entries * _ENTRY
