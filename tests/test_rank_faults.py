"""Ranks that die, hang, or are only slow: told apart in time, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch.distributed as dist

import lmi_multi
from lmi_multi import progress
from lmi_multi.errors import OptionError, RankError
from lmi_multi.parallel.local import LocalRanks
from lmi_multi.parallel.ranks import Rank, Ranks
from lmi_multi.parallel.serving import CallerGoneError, serve
from lmi_multi.parallel.watch import VARIABLE
from lmi_multi.progress import Reading
from tests.test_ranks import rank_processes
from tests.tiny_models import checkpoint

# Seconds in place of 30: where ranks beat once a second, and five seconds late on a busy machine;
# and where there are none.
LIMIT = 14
SHORT = 4


class Toy:
    """What a rank may hold; no model needed."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank

    def work(self, seconds: float, every: float) -> str:
        """Work on pieces that take `every` seconds each."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            progress.tick()
            time.sleep(every)
        return "done"

    def meet(self, late: int, seconds: float, every: float) -> str:
        """Meet the other rank, which waits while rank `late` works."""
        if self.rank == late:
            self.work(seconds, every)
        with progress.waiting():
            dist.barrier()
        return "met"


@pytest.fixture(scope="module")
def two() -> Iterator[LocalRanks]:
    """Ranks for the tests that leave them whole; and at last for one that does not."""
    opened = LocalRanks(2, Toy)
    yield opened
    opened.close()


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(LIMIT))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(SHORT))


def gone(processes: list[psutil.Process], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while any(runs(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_ranks_that_get_on_and_ranks_that_wait_for_them(two: LocalRanks, limited: None) -> None:
    """For longer than a rank may stand still."""
    assert two.call("meet", 0, 1.2 * LIMIT, 0.5) == "met"


@pytest.mark.parametrize("late", [1])
def test_a_rank_that_does_not_get_on(two: LocalRanks, limited: None, late: int) -> None:
    """It is named, and not the one that waits for it in a collective."""
    processes = [psutil.Process(rank.process.pid) for rank in two.ranks]
    began = time.monotonic()
    with pytest.raises(RankError) as caught:
        two.call("meet", late, 600, 600)
    assert LIMIT <= time.monotonic() - began < 3 * LIMIT
    assert str(caught.value) == f"rank {late} hangs: no progress for {LIMIT} s"
    assert gone(processes)
    with pytest.raises(RankError, match="hangs"):
        two.call("meet", late, 0, 0)


def test_a_rank_that_is_stopped(checkpoints: Path) -> None:
    """With the limits that everybody has: noticed within 30 s, and ended though it is stopped."""
    folder = checkpoint(checkpoints, "gpt2")
    before = {process.pid for process in rank_processes()}
    with lmi_multi.load(folder, backend="cpu", dtype="fp32", pipeline_parallel=2) as model:
        own = [process for process in rank_processes() if process.pid not in before]
        victim = model._engine.executor._ranks.ranks[1].process  # type: ignore[attr-defined]
        stopped: list[float] = []

        def stop() -> None:
            os.kill(victim.pid, signal.SIGSTOP)
            stopped.append(time.monotonic())

        with pytest.raises(RankError) as caught:
            for chunk in model.stream([[5, 6, 7]], max_new_tokens=120, ignore_eos=True):
                if not stopped and chunk.token_ids:
                    stop()
        assert time.monotonic() - stopped[0] < 30
        assert str(caught.value) == "rank 1 hangs: nothing was heard for 15 s"
        assert gone(own)


# --- the same without processes


def _ranks(count: int = 1) -> tuple[Ranks, list[Any]]:
    """Ranks that nobody answers for, and the other ends of their pipes."""
    ends = [Pipe() for _ in range(count)]
    return Ranks([Rank(i, ours) for i, (ours, _) in enumerate(ends)], 0), [end[1] for end in ends]


class _Clock:
    def __init__(self, now: list[float]) -> None:
        self._now = now

    def monotonic(self) -> float:
        return self._now[0]

    sleep = staticmethod(time.sleep)


def _say(
    monkeypatch: pytest.MonkeyPatch, ends: list[Any], words: Iterable[Sequence[Any]]
) -> list[float]:
    """Have ranks say something once a second of a clock that the first item of the result shows:
    how far they are, or a text that ends the call, or nothing."""
    now, rounds = [0.0], iter(words)

    def wait(watched: list[Any], seconds: float) -> list[Any]:
        now[0] += 1.0
        for end, said in zip(ends, next(rounds), strict=True):
            if said is not None:
                end.send((1, "beat" if isinstance(said, Reading) else "ok", said))
        return []

    monkeypatch.setattr("lmi_multi.parallel.ranks.time", _Clock(now))
    monkeypatch.setattr("lmi_multi.parallel.ranks.wait", wait)
    return now


def test_a_slow_call_that_gets_on(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, ends = _ranks()
    _say(monkeypatch, ends, [*([Reading(i, False)] for i in range(3 * SHORT)), ["done"]])
    assert ranks.call("anything") == "done"


def test_a_long_call_may_be_still_for_longer(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for still in (7.0, 0.05):
        ranks, ends = _ranks()
        now = _say(monkeypatch, ends, [*[[Reading(1, False)]] * 7, ["done"]])
        if still > 1:
            assert ranks.call("anything", still=still) == "done"
        else:
            with pytest.raises(RankError, match=f"rank 0 hangs: no progress for {SHORT} s"):
                ranks.call("anything", still=still)
            assert SHORT <= now[0] <= SHORT + 2


def test_a_rank_that_ends_gives_those_that_waited_for_it_time(
    short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they waited for has only now been done: they have not stood still until then."""
    ranks, ends = _ranks(2)
    waiting = [(Reading(i, False), Reading(1, True)) for i in range(3 * SHORT)]
    _say(monkeypatch, ends, [*waiting, ("met", None), (None, "met")])
    assert ranks.call("anything") == "met"


def test_the_first_failure_is_told(short: None) -> None:
    """Not that of a rank which has lost its peer, though the caller hears that one first."""
    ranks, ends = _ranks(2)
    ends[1].send((1, "traceback", (10.0, "no memory")))
    ends[0].send((1, "traceback", (10.5, "connection closed by peer")))
    with pytest.raises(RankError, match="rank 1 failed: no memory"):
        ranks.call("anything")


def test_the_last_words_of_a_rank_are_heard(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it says them, and ends, just when its pipe has been found empty."""
    ranks, [end] = _ranks()
    real = ranks.ranks[0].pipe
    process: Any = SimpleNamespace(sentinel=None, exitcode=0, join=lambda seconds: None)
    process.is_alive = lambda: not end.closed

    class Pipe:
        recv, send, close = real.recv, real.send, real.close

        def poll(self) -> bool:
            found = real.poll()
            if not end.closed:
                end.send((1, "OptionError", (0.0, "dtype is 'fp5'")))
                end.close()
            return found

    ranks.ranks[0].pipe, ranks.ranks[0].process = Pipe(), process
    monkeypatch.setattr("lmi_multi.parallel.ranks.wait", lambda watched, seconds: [])
    with pytest.raises(OptionError, match="dtype is 'fp5'"):
        ranks.call("anything")


def test_half_an_answer(short: None) -> None:
    """A rank that is stopped while it sends: what it sent is there, the rest never comes."""
    ranks, [rank] = _ranks()
    os.write(rank.fileno(), struct.pack("!i", 1000) + b"half")
    with pytest.raises(RankError, match="rank 0 hangs in the middle of a message"):
        ranks.call("anything")


def test_a_rank_that_takes_no_message(short: None) -> None:
    ranks, ends = _ranks(2)
    with pytest.raises(RankError, match="rank 0 hangs: it takes no message"):
        ranks.call("anything", b"x" * 10_000_000)
    for end in ends:
        end.close()


def test_half_a_message_is_waited_for_no_longer_than_a_silent_rank(short: None) -> None:
    """A message can stall twice: some of it had room."""
    ranks, _ = _ranks()
    with socket.fromfd(ranks.ranks[0].pipe.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as own:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            seconds, micros = struct.unpack("ll", own.getsockopt(socket.SOL_SOCKET, option, 16))
            assert 0 < 2 * (seconds + micros / 1e6) < SHORT


def test_a_connection_that_ends(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It wakes the caller at once, who would else wait for beats that do not come."""
    monkeypatch.setattr("lmi_multi.parallel.ranks.BEAT", 100.0)
    ranks, [first, second] = _ranks(2)
    threading.Timer(0.2, second.close).start()
    with pytest.raises(RankError, match="rank 1 died: its connection has ended"):
        ranks.call("anything")
    with pytest.raises(EOFError):
        while True:
            first.recv()  # the call, and then the end: nobody waits for it any more


class Busy:
    """A process that takes no notice, and some time to be gone once it is killed, as one does that
    has much of a GPU."""

    exitcode = -signal.SIGKILL

    def __init__(self, others: list[Busy], seconds: float) -> None:
        self._others, self._seconds, self._gone = others, seconds, float("inf")
        self.all_killed = False
        others.append(self)

    def is_alive(self) -> bool:
        return time.monotonic() < self._gone

    def kill(self) -> None:
        self._gone = time.monotonic() + self._seconds

    def join(self, seconds: float) -> None:
        killed = [other._gone < float("inf") for other in self._others]
        self.all_killed = all(killed)
        assert self.all_killed or not any(killed), "waits for one before it has killed all"
        time.sleep(max(0.0, min(seconds, self._gone - time.monotonic())))


def test_ranks_that_take_long_to_be_gone() -> None:
    """Whoever closes them, or is told of a fault, finds none left."""
    processes: list[Busy] = []
    ranks = Ranks([Rank(i, Pipe()[0], Busy(processes, 1.6)) for i in range(2)], 0)
    began = time.monotonic()
    ranks.close()
    assert not any(process.is_alive() for process in processes)
    assert all(process.all_killed for process in processes)
    assert 2.6 <= time.monotonic() - began < 4  # a second to end by themselves; then both at once


def test_a_thread_that_ends_in_order_has_time_to() -> None:
    """It drops graphs and communicators; the process must not end in the middle of that."""
    ended: list[bool] = []

    def close() -> None:
        time.sleep(1.5)
        ended.append(True)

    thread = threading.Thread(target=close, daemon=True)
    thread.start()
    Ranks([Rank(0, Pipe()[0], thread=thread)], 0).close()
    assert ended


def test_a_thread_beside_a_failed_rank_is_not_waited_for() -> None:
    forever = threading.Event()
    thread = threading.Thread(target=forever.wait, args=(20,), daemon=True)
    thread.start()
    (first, _own), (second, other) = Pipe(), Pipe()
    ranks = Ranks([Rank(0, first, thread=thread), Rank(1, second)], 0)
    other.close()
    began = time.monotonic()
    with pytest.raises(RankError, match="rank 1 died"):
        ranks.call("anything")
    assert time.monotonic() - began < 2
    forever.set()


def test_an_end_of_file_in_a_rank_is_not_a_lost_caller() -> None:
    """What a rank raises is told, whatever it is."""
    ours, theirs = Pipe()
    lost: list[bool] = []

    def build() -> None:
        raise EOFError("a short file")

    assert isinstance(serve(theirs, build, True, lambda: lost.append(True)), EOFError)
    number, kind, (_, text) = ours.recv()
    assert (number, kind) == (0, "traceback") and "EOFError: a short file" in text
    assert not lost
    ours.close()
    assert isinstance(serve(theirs, list, True, lambda: lost.append(True)), CallerGoneError)
    assert lost
    theirs.close()


def test_a_caller_that_was_stopped_has_not_waited(
    short: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that was suspended, with all that is on it, comes back: no rank was silent."""
    ranks, [rank] = _ranks()
    now = [0.0]
    monkeypatch.setattr("lmi_multi.parallel.ranks.time", _Clock(now))
    naps = iter([0.5, 3600.0, 0.5])

    def wait(watched: list[Any], seconds: float) -> list[Any]:
        nap = next(naps, None)
        if nap is None:
            rank.send((1, "ok", "late"))
            return []
        now[0] += nap
        return []

    monkeypatch.setattr("lmi_multi.parallel.ranks.wait", wait)
    monkeypatch.setenv(VARIABLE, "8")
    assert ranks.call("anything") == "late"
