"""Ranks, wherever they run: called in lock step, watched, and ended together."""

from __future__ import annotations

import signal
import socket
import struct
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

from lmi_multi import errors, interrupts
from lmi_multi.errors import LmiError, RankError
from lmi_multi.parallel.serving import CLOSE
from lmi_multi.parallel.watch import BEAT, Patience, Watch, configured, fault

GRACE = 1.0  # seconds to hear from the other ranks once one has failed, or has been told to end
# Seconds that an ended one may take to be gone: the driver first takes back what it had of a GPU.
LAST = 10.0


@dataclass
class Rank:
    """One rank as its caller sees it: a pipe to it, and the process if it is a child of this one,
    or the thread if it is in this one.

    `where` it is, in words, if not on this host.
    """

    number: int
    pipe: Connection
    process: Any = None
    thread: threading.Thread | None = None
    where: str = ""

    def __post_init__(self) -> None:
        bound(self.pipe, configured() / 3)  # a message can stall twice: some of it had room

    @property
    def watched(self) -> list[Any]:
        """What becomes ready when the rank speaks or ends."""
        return [self.pipe] if self.process is None else [self.pipe, self.process.sentinel]

    @property
    def ended(self) -> bool:
        """Whether the process is known to have ended."""
        return self.process is not None and not self.process.is_alive()

    def fate(self) -> str:
        """How it ended, now that its pipe has: a large process may take long to be taken apart."""
        if self.process is not None:
            self.process.join(GRACE)
        return (
            _reason(self.process.exitcode)
            if self.ended
            else f"its connection{self.where} has ended"
        )

    def wait(self, deadline: float) -> None:
        """Until it has ended by itself, or until `deadline`."""
        for running in (self.process, self.thread):
            if running is not None:
                running.join(max(0.0, deadline - time.monotonic()))


@dataclass(frozen=True)
class Failure:
    """What a rank raised `at` a time, in seconds since the epoch by its host's clock; 0 if it died,
    which comes before whatever others say of it."""

    error: LmiError
    at: float = 0.0


class Ranks:
    """Objects, one a rank, that are all called together.

    The caller sends every rank the same calls over a pipe of its own and never waits in a
    collective, so that a rank that dies or hangs fails the call, whatever the others are waiting
    for. What failed once is ended as a whole and stays unusable. Results are those of rank
    `answering`.
    """

    def __init__(self, ranks: Sequence[Rank], answering: int) -> None:
        self.ranks = list(ranks)
        self._answering = answering
        self._failure: LmiError | None = None
        self._number = 0
        self._mid_message = False  # while a pipe may hold half a message
        # For whoever drops it, or ends, without closing it.
        self._finalizer = weakref.finalize(self, _end, self.ranks, True)

    def call(self, method: str, *arguments: Any, still: float = 0.0) -> Any:
        """Call `method` on every rank's object; the answering rank's result.

        `still`: seconds that it may stand still, if more than `watch.configured`. Raises what the
        ranks raised if it is an LmiError, otherwise RankError with the failing rank's traceback, or
        with the rank that died or hangs; after that all ranks have ended.
        """
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        patience = Patience.of(still)
        self._number += 1
        try:
            self._send((self._number, method, arguments))
            return self._collect(patience)
        except BaseException:
            if self._mid_message:  # ranks that heard different things would wait for each other
                self._failure = RankError(f"the call of {method} was interrupted while it was sent")
                self.close()
            raise

    def close(self) -> None:
        """End every rank. Calling it twice is fine."""
        _end(self.ranks, self._failure is None)
        self._finalizer.detach()
        if self._failure is None:
            self._failure = RankError("the ranks of this model were closed")

    def _send(self, message: tuple[int, str, tuple[Any, ...]]) -> None:
        with interrupts.delayed():
            self._mid_message = True  # half a message would make the ranks unusable
            for rank in self.ranks:
                try:
                    rank.pipe.send(message)
                except BlockingIOError:
                    self._mid_message = False
                    self._fail(RankError(f"rank {rank.number} hangs: it takes no message"))
                except OSError:  # the rank is gone: _collect says which, and why
                    break
            self._mid_message = False

    def _collect(self, patience: Patience) -> Any:
        """Wait for every rank's answer to the current call."""
        pending = {rank.number: (rank, Watch()) for rank in self.ranks}
        result = None
        while pending:
            began = time.monotonic()
            wait([what for rank, _ in pending.values() for what in rank.watched], BEAT)
            passed = min(time.monotonic() - began, 2 * BEAT)
            for number, (rank, watch) in list(pending.items()):
                watch.passed(passed)
                answer = self._receive(rank, watch)
                if answer is None:
                    continue
                if isinstance(answer, Failure):
                    self._fail(self._blame(answer, [r for r, _ in pending.values() if r != rank]))
                elif number == self._answering:
                    result = answer[0]
                del pending[number]
                for _, other in pending.values():
                    other.other_done()
            text = fault({number: watch for number, (_, watch) in pending.items()}, patience)
            if text is not None:
                self._fail(RankError(text))
        return result

    def _receive(self, rank: Rank, watch: Watch | None = None) -> tuple[Any] | Failure | None:
        """A rank's answer as a one-tuple, its failure, or None if there is none yet."""
        ended = rank.ended  # before its pipe is looked into: then what it said last is there
        try:
            while rank.pipe.poll():
                with interrupts.delayed():
                    self._mid_message = True
                    number, kind, value = rank.pipe.recv()
                    self._mid_message = False
                if kind == "beat":
                    if watch is not None:
                        watch.heard(value)
                elif number == self._number or kind != "ok":
                    return (value,) if kind == "ok" else _rebuild(rank.number, kind, *value)
                # Else it answers a call that its caller gave up on (Ctrl-C).
            if not ended:
                return None
        except BlockingIOError:
            self._mid_message = False
            hangs = RankError(f"rank {rank.number} hangs in the middle of a message")
            return Failure(hangs, time.time())
        except (EOFError, OSError):
            self._mid_message = False
        return Failure(RankError(f"rank {rank.number} died: {rank.fate()}"))

    def _blame(self, failure: Failure, others: list[Rank]) -> LmiError:
        """The failure to report: the first one, though a rank that lost its peer may have been
        heard before that peer."""
        deadline = time.monotonic() + GRACE
        silent = list(others)
        while failure.at:  # nothing comes before a death
            for other in list(silent):
                answer = self._receive(other)
                if answer is not None:  # it has spoken: that it ends now is no news
                    silent.remove(other)
                if isinstance(answer, Failure) and answer.at < failure.at:
                    failure = answer
            if not silent or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return failure.error

    def _fail(self, failure: LmiError) -> NoReturn:
        self._failure = failure
        self.close()
        raise failure


def _end(ranks: list[Rank], in_order: bool) -> None:
    """End every rank: `in_order` unless it may be busy, or be waiting for one that has failed.

    A process that has not ended by itself soon is ended by force. A thread cannot be: in order it
    ends, but beside one that has failed it may wait in a collective as long as this process lives.
    """
    for rank in ranks:
        if in_order:
            with suppress(OSError):
                rank.pipe.send((0, CLOSE, ()))
        rank.pipe.close()
    deadline = time.monotonic() + GRACE
    for rank in ranks:
        rank.wait(deadline)
    for rank in ranks:
        if rank.process is not None and rank.process.is_alive():
            rank.process.kill()
    deadline = time.monotonic() + LAST
    for rank in ranks:
        if rank.process is not None or in_order:
            rank.wait(deadline)


def bound(pipe: Connection, seconds: float) -> None:
    """Let a message that stops half way raise BlockingIOError in the end: a rank that is stopped
    neither ends what it began to send nor takes what is sent to it."""
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    with socket.fromfd(pipe.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as own:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            own.setsockopt(socket.SOL_SOCKET, option, limit)


def _rebuild(rank: int, kind: str, at: float, text: str) -> Failure:
    """A rank's error as it was raised there, or its traceback as a RankError."""
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, LmiError):
        return Failure(known(text), at)
    return Failure(RankError(f"rank {rank} failed: {text}"), at)


def _reason(code: int | None) -> str:
    if code is not None and code < 0:
        known = {int(s): s.name for s in signal.Signals}
        return f"killed by {known.get(-code, f'signal {-code}')}"
    return f"exit code {code}"
