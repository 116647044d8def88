"""Ranks as processes: started, called in lock step, watched, and ended together."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._C._distributed_c10d import FileStore

from lmi_multi import errors, interrupts
from lmi_multi.errors import LmiError, OptionError, RankError

CALL_TIMEOUT = 600.0  # seconds; a long prefill on a slow host is legitimate
GRACE = 1.0  # seconds to hear from the other ranks once one has failed

_GUARD = (
    "tensor_parallel > 1 starts processes that import your script again: put the call under "
    '`if __name__ == "__main__":`'
)


class RankGroup:
    """`size` processes, each holding what `build(rank, size)` returned there.

    The caller's process is no rank: it sends every rank the same calls over a private pipe and
    watches the processes, so that a rank that dies fails the call at once, whatever collective
    the others are waiting in. A failed group is ended as a whole and stays unusable.
    """

    def __init__(
        self, size: int, build: Callable[[int, int], Any], process_group: str = "gloo"
    ) -> None:
        if getattr(mp.current_process(), "_inheriting", False):
            raise OptionError(_GUARD)
        self._failure: LmiError | None = None
        self._number = 0
        self._mid_message = False  # while a pipe may hold half a message
        context = mp.get_context("spawn")
        self._store = tempfile.TemporaryDirectory(prefix="lmi_multi-ranks-")
        store = Path(self._store.name) / "store"
        threads = max(1, torch.get_num_threads() // size)
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        try:
            for rank in range(size):
                ours, theirs = context.Pipe()
                arguments = (
                    *(rank, size, build, theirs),
                    *(str(store), threads, process_group, os.getpid()),
                )
                process = context.Process(
                    target=_serve, args=arguments, name=f"lmi_multi-rank-{rank}", daemon=True
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
            self._collect(CALL_TIMEOUT)
        except RankError as error:
            self.close()
            if " died: exit code " in str(error):  # it could not even say why
                raise RankError(f"{error}. {_GUARD}") from None
            raise
        except BaseException:
            self.close()
            raise

    def call(self, method: str, *arguments: Any) -> Any:
        """Call `method` on every rank's object; rank 0's result.

        Raises what the ranks raised if it is an LmiError, otherwise RankError with the failing
        rank's traceback; after that the group has ended.
        """
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        self._number += 1
        try:
            self._send((self._number, method, arguments))
            return self._collect(CALL_TIMEOUT)
        except BaseException:
            if self._mid_message:  # ranks that heard different things would wait for each other
                self._failure = RankError(f"the call of {method} was interrupted while it was sent")
                self.close()
            raise

    def _send(self, message: tuple[int, str, tuple[Any, ...]]) -> None:
        with interrupts.delayed():
            self._mid_message = True  # half a message would make the group unusable
            for pipe in self._pipes:
                try:
                    pipe.send(message)
                except OSError:  # the process is gone: _collect says which, and why
                    break
            self._mid_message = False

    def close(self) -> None:
        """End every process. Calling it twice is fine."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + GRACE
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._store.cleanup()
        if self._failure is None:
            self._failure = RankError("the ranks of this model were closed")

    def _collect(self, timeout: float) -> Any:
        """Wait for every rank's answer to the current call."""
        deadline = time.monotonic() + timeout
        pending = dict(enumerate(self._pipes))
        result = None
        while pending:
            left = deadline - time.monotonic()
            watched = [*pending.values(), *(self._processes[rank].sentinel for rank in pending)]
            if left <= 0 or not wait(watched, left):
                late = ", ".join(str(rank) for rank in pending)
                self._fail(RankError(f"no answer from rank {late} within {timeout:.0f} s"))
            for rank, pipe in list(pending.items()):
                answer = self._receive(rank, pipe)
                if answer is None:
                    continue
                if isinstance(answer, LmiError):
                    self._fail(self._blame(rank, answer, pending))
                elif rank == 0:
                    result = answer[0]
                del pending[rank]
        return result

    def _receive(self, rank: int, pipe: Connection) -> tuple[Any] | LmiError | None:
        """A rank's answer as a one-tuple, its failure, or None if there is none yet."""
        try:
            while pipe.poll():
                with interrupts.delayed():
                    self._mid_message = True
                    number, kind, value = pipe.recv()
                    self._mid_message = False
                if number != self._number and kind == "ok":
                    continue  # the answer to a call that its caller gave up on (Ctrl-C)
                return (value,) if kind == "ok" else _rebuild(rank, kind, value)
        except (EOFError, OSError):
            self._mid_message = False
            self._processes[rank].join(GRACE)
        if self._processes[rank].is_alive():
            return None
        return RankError(f"rank {rank} died: {_reason(self._processes[rank].exitcode)}")

    def _blame(self, rank: int, failure: LmiError, pending: dict[int, Connection]) -> LmiError:
        """The failure to report. A rank that lost its peer reports it first: look for the peer."""
        deadline = time.monotonic() + GRACE
        others = {r: pipe for r, pipe in pending.items() if r != rank}
        while others and time.monotonic() < deadline and not _is_death(failure):
            for other, pipe in list(others.items()):
                answer = self._receive(other, pipe)
                if answer is not None:  # it has spoken: that it ends now is no news
                    del others[other]
                if isinstance(answer, LmiError) and _is_death(answer):
                    return answer
            time.sleep(0.02)
        return failure

    def _fail(self, failure: LmiError) -> NoReturn:
        self._failure = failure
        self.close()
        raise failure


def _is_death(failure: LmiError) -> bool:
    return " died: " in str(failure)


def _rebuild(rank: int, kind: str, text: str) -> LmiError:
    """A rank's error as it was raised there, or its traceback as a RankError."""
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, LmiError):
        return known(text)
    return RankError(f"rank {rank} failed:\n{text}")


def _reason(code: int | None) -> str:
    if code is not None and code < 0:
        known = {int(s): s.name for s in signal.Signals}
        return f"killed by {known.get(-code, f'signal {-code}')}"
    return f"exit code {code}"


def _serve(
    rank: int,
    size: int,
    build: Callable[[int, int], Any],
    pipe: Connection,
    store: str,
    threads: int,
    process_group: str,
    parent: int,
) -> None:
    """A rank's life: join the group, build, then answer calls until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
    # Standard output is for the caller's results; Gloo of torch 2.9 and 2.10 greets its peers.
    os.dup2(2, 1)
    _follow(parent, Path(store).parent)
    torch.set_num_threads(threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # ranks of one host talk over loopback
    number = 0
    try:
        dist.init_process_group(
            process_group,
            store=FileStore(store, size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=CALL_TIMEOUT),
        )
        target = build(rank, size)
        pipe.send((number, "ok", None))
        while True:
            number, method, arguments = pipe.recv()
            value = getattr(target, method)(*arguments)
            pipe.send((number, "ok", value if rank == 0 else None))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the caller has closed the group, or is gone
    except LmiError as error:
        pipe.send((number, type(error).__name__, str(error)))
    except BaseException:
        pipe.send((number, "traceback", traceback.format_exc()))
    finally:
        # Skip destructors: a peer that is gone would block them.
        os._exit(0)


def _follow(parent: int, folder: Path) -> None:
    """End this process when `parent` ends, even while it waits in a collective, and remove the
    `folder` that the parent cannot remove any more."""

    def watch() -> None:
        while os.getppid() == parent:  # another number once the parent has gone
            time.sleep(0.1)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
