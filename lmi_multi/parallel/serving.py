"""A rank's side: build, then answer the caller's calls, and say meanwhile how far it is."""

from __future__ import annotations

import os
import select
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

from lmi_multi import progress
from lmi_multi.errors import LmiError
from lmi_multi.parallel.watch import BEAT

CLOSE = "close"  # the message that ends a rank in order, in place of a method's name
# Not on every system, which then tells only when both directions are closed.
_LOST = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


class CallerGoneError(Exception):
    """There is nobody at the other end of the pipe."""


def serve(
    pipe: Connection,
    build: Callable[[], Any],
    answers: bool,
    lost: Callable[[], None],
    alone: Callable[[], bool] = lambda: False,
) -> BaseException | None:
    """Say whether `build` succeeds, then the outcome of every call, until the caller closes.

    Results are sent only if the rank `answers`. Returns what was raised, which the caller has been
    told; None when closed in order. `lost` is called when the caller is gone: in a thread of its
    own if the rank is at work meanwhile, or if `alone` says so, which is asked once a second.
    """
    pulse = Pulse(pipe, lost, alone)
    number = 0
    try:
        with pulse.beating(number):
            target = build()
        pulse.send(number, "ok", None)
        while True:
            number, method, arguments = _receive(pipe)
            if method == CLOSE:
                if hasattr(target, "close"):
                    target.close()  # graphs go before the NCCL communicators that they use
                return None
            with pulse.beating(number):
                value = getattr(target, method)(*arguments)
            pulse.send(number, "ok", value if answers else None)
    except CallerGoneError as error:
        lost()
        return error
    except BaseException as error:
        at = time.time()  # what others raise because this rank ends comes later
        known = isinstance(error, LmiError)
        text = str(error) if known else f"{_line(error)}\n{traceback.format_exc()}"
        with suppress(CallerGoneError):
            pulse.send(number, type(error).__name__ if known else "traceback", (at, text))
        return error
    finally:
        pulse.end()


def _line(error: BaseException) -> str:
    """What an error says, in a line."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def _receive(pipe: Connection) -> tuple[int, str, tuple[Any, ...]]:
    """The next call."""
    try:
        message: tuple[int, str, tuple[Any, ...]] = pipe.recv()
    except (EOFError, OSError) as error:
        raise CallerGoneError(str(error)) from None
    return message


def leave(status: int) -> None:
    """End this process without destructors: a peer that is gone would block them."""
    os._exit(status)


class Pulse:
    """A thread that beats while the rank works, and looks whether the caller is still there."""

    def __init__(
        self, pipe: Connection, lost: Callable[[], None], alone: Callable[[], bool]
    ) -> None:
        self._pipe, self._lost, self._alone = pipe, lost, alone
        self._sending = threading.Lock()
        self._number: int | None = None  # of the call that is worked on
        self._ended = False
        threading.Thread(target=self._run, name="lmi_multi-pulse", daemon=True).start()

    def send(self, number: int, kind: str, value: Any) -> None:
        """One message, whole. Raises CallerGoneError."""
        try:
            with self._sending:
                self._pipe.send((number, kind, value))
        except OSError as error:
            raise CallerGoneError(str(error)) from None

    @contextmanager
    def beating(self, number: int) -> Iterator[None]:
        """Around the work on a call."""
        self._number = number
        try:
            yield
        finally:
            self._number = None

    def end(self) -> None:
        """No more beats."""
        self._ended = True

    def _run(self) -> None:
        caller = select.poll()
        caller.register(self._pipe.fileno(), _LOST)
        while not self._ended:
            gone = bool(caller.poll(BEAT * 1000))
            number = self._number
            if self._alone():
                break
            if number is None:
                if gone:
                    time.sleep(0.1)  # whoever reads the pipe sees it too, and what came before it
            elif gone or not self._beat(number):
                break
        if not self._ended:
            self._lost()

    def _beat(self, number: int) -> bool:
        """Whether there is somebody to hear it."""
        try:
            self.send(number, "beat", progress.read())
        except CallerGoneError:
            return False
        return True
