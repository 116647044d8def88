"""Ranks as processes: the same tokens, clear failures, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

import lmi_multi
from lmi_multi.errors import CapacityError, OptionError, RankError
from lmi_multi.parallel import ranks
from lmi_multi.parallel.local import LocalRanks
from tests.tiny_models import checkpoint

ROOT = Path(__file__).parents[1]


def rank_processes(parent: int | None = None) -> list[psutil.Process]:
    """The children of a process that are not multiprocessing's own helper."""
    return [p for p in psutil.Process(parent).children(recursive=True) if _is_rank(p)]


def _is_rank(process: psutil.Process) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return "resource_tracker" not in str(process.cmdline())
    except psutil.NoSuchProcess:  # it has ended by now
        return False


def until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


class Toy:
    """What a rank may hold; no model needed."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank

    def echo(self, value: Any) -> Any:
        return value

    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return "woken"

    def fail_on_one(self, text: str) -> None:
        """Rank 0 fails too, as rank 1 has gone, for which it waits."""
        if self.rank == 1:
            raise RuntimeError(text)
        dist.barrier()


def build_fails(rank: int, size: int) -> Toy:
    if rank == 1:
        raise ZeroDivisionError("no such luck")
    return Toy(rank, size)


def build_lacks_memory(rank: int, size: int) -> Toy:
    raise CapacityError(f"rank {rank} lacks 3 GiB")


@pytest.fixture(scope="module")
def shared() -> Iterator[LocalRanks]:
    """A group for the tests that leave it whole."""
    before = {process.pid for process in rank_processes()}
    group = LocalRanks(2, Toy)
    own = [process for process in rank_processes() if process.pid not in before]
    assert len(own) == 2
    yield group
    group.close()
    group.close()
    assert until(lambda: not any(process.is_running() for process in own))
    with pytest.raises(RankError, match="were closed"):
        group.call("echo", 1)


def test_calls(shared: LocalRanks) -> None:
    assert shared.call("echo", {"a": [1, 2]}) == {"a": [1, 2]}
    assert shared.call("echo", b"x" * 300_000) == b"x" * 300_000


def test_the_answer_to_an_interrupted_call_is_not_the_next_ones(
    shared: LocalRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, waits = ranks.wait, []

    def interrupted(*arguments: Any) -> Any:
        waits.append(1)
        if len(waits) == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(ranks, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shared.call("sleep", 0.3)
    assert shared.call("echo", "mine") == "mine"
    for value in range(5):
        assert shared.call("echo", value) == value


class Interrupting:
    """A pipe during whose `send` or `recv` Ctrl-C is pressed, before and after the real one."""

    def __init__(self, pipe: Any, method: str) -> None:
        self._pipe = pipe
        self._method = method

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._pipe, name)
        if name != self._method:
            return real

        def interrupted(*arguments: Any) -> Any:
            signal.raise_signal(signal.SIGINT)
            result = real(*arguments)
            signal.raise_signal(signal.SIGINT)
            return result

        return interrupted

    def fileno(self) -> int:
        return int(self._pipe.fileno())


@pytest.mark.parametrize("method", ["send", "recv"])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupt_in_the_middle_of_a_message(
    shared: LocalRanks, monkeypatch: pytest.MonkeyPatch, method: str, rank: int
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            victim = shared.ranks[rank]
            patch.setattr(victim, "pipe", Interrupting(victim.pipe, method))
            with pytest.raises(KeyboardInterrupt):
                shared.call("echo", 1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    for value in range(3):
        assert shared.call("echo", value) == value


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (build_fails, RankError, r"rank 1 failed: ZeroDivisionError: no such luck\nTraceback"),
        (build_lacks_memory, CapacityError, r"rank \d lacks 3 GiB"),
    ],
)
def test_a_rank_that_cannot_be_built(build: Any, kind: type[Exception], message: str) -> None:
    before = {process.pid for process in rank_processes()}
    with pytest.raises(kind, match=f"(?s){message}"):
        LocalRanks(2, build)
    assert until(lambda: {p.pid for p in rank_processes()} <= before)


def test_a_rank_that_raises_ends_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is named, even by a caller that looks only when both ranks have failed and ended."""
    before = {process.pid for process in rank_processes()}
    group = LocalRanks(2, Toy)
    real = ranks.wait

    def late(*arguments: Any) -> Any:
        for rank in group.ranks:
            rank.process.join(60)
        return real(*arguments)

    monkeypatch.setattr(ranks, "wait", late)
    with pytest.raises(RankError, match=r"(?s)rank 1 failed:.*RuntimeError: bad luck") as first:
        group.call("fail_on_one", "bad luck")
    with pytest.raises(RankError) as again:
        group.call("echo", 1)
    assert str(again.value) == str(first.value)
    assert until(lambda: {p.pid for p in rank_processes()} <= before)


def test_a_rank_killed_during_a_generate(checkpoints: Path) -> None:
    """Told within 2 s, with the reason, by one run of three: a machine may be busy for as long."""
    told = (_kill_during_a_generate(checkpoint(checkpoints, "gpt2")) for _ in range(3))
    assert any(took < 2 and said == "rank 1 died: killed by SIGKILL" for took, said in told)


def _kill_during_a_generate(folder: Path) -> tuple[float, str]:
    """How long it took until the caller knew, and what it was told."""
    before = {process.pid for process in rank_processes()}
    with lmi_multi.load(folder, backend="cpu", dtype="fp32", tensor_parallel=2) as model:
        victim = model._engine.executor._ranks.ranks[1].process  # type: ignore[attr-defined]
        killed: list[float] = []

        def kill() -> None:
            killed.append(time.monotonic())
            os.kill(victim.pid, signal.SIGKILL)

        with pytest.raises(RankError, match="rank 1 died: ") as first:
            for chunk in model.stream([[5, 6, 7]], max_new_tokens=100, ignore_eos=True):
                if not killed and chunk.token_ids:
                    threading.Timer(0.01, kill).start()
                    until(lambda: bool(killed))
        took = time.monotonic() - killed[0]
        assert until(lambda: {p.pid for p in rank_processes()} <= before)
        with pytest.raises(RankError) as again:
            model.generate([[5, 6, 7]])
        assert str(again.value) == str(first.value)
    return took, str(first.value)


# --- whole scripts


def run_script(folder: Path, text: str, *arguments: str) -> subprocess.Popen[str]:
    script = folder / "script.py"
    script.write_text(text)
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(folder),
        },
        start_new_session=True,
    )


SCRIPT = """
import multiprocessing, os, signal, sys, threading, time
import lmi_multi
from lmi_multi.parallel.local import LocalRanks

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]

def load(folder, degree):
    return lmi_multi.load(
        folder, backend="cpu", dtype="fp32", tensor_parallel=degree, max_batch=2, max_tokens=120
    )

def tokens(model, **options):
    return [c.token_ids for c in model.generate(PROMPTS, max_new_tokens=12, **options)]

class Sleeper:
    def __init__(self, rank, size):
        self.rank = rank

    def sleep(self):
        print("a rank's output", flush=True)
        if self.rank == 1:  # the last to hear of it
            open("asleep", "w").close()
        time.sleep(600)

def say_when_asleep():
    while not os.path.exists("asleep"):
        time.sleep(0.02)
    print("ready", flush=True)

def check(one, two):
    for options in ({}, {"do_sample": True, "seed": 3}, {"num_beams": 2}):
        expected = tokens(one, **options)
        assert tokens(two, **options) == expected, one.artifact.folder
    for delay in (0.02, 0.1):
        deadline = time.monotonic() + 60
        try:
            threading.Timer(delay, os.killpg, (os.getpgrp(), signal.SIGINT)).start()
            while time.monotonic() < deadline:
                two.generate(PROMPTS, max_new_tokens=20, ignore_eos=True)
            raise AssertionError("Ctrl-C had no effect")
        except KeyboardInterrupt:
            pass
    assert tokens(two) == tokens(one), "after Ctrl-C"

if __name__ == "__main__":
    # Shells start background jobs with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    first, second = sys.argv[1:]
    with load(first, 1) as one, load(first, 2) as two:
        check(one, two)
    deadline = time.monotonic() + 60
    while left := multiprocessing.active_children():  # which collects those that have ended
        assert time.monotonic() < deadline, left
        time.sleep(0.02)
    with load(second, 1) as one, load(second, 2) as two:
        check(one, two)
    threading.Thread(target=say_when_asleep, daemon=True).start()
    LocalRanks(2, Sleeper).call("sleep")
"""


def test_a_whole_run_with_two_ranks(checkpoints: Path, tmp_path: Path) -> None:
    """The same tokens as one rank, Ctrl-C, close, and at last a parent that is killed."""
    folders = [str(checkpoint(checkpoints, n)) for n in ("t5", "llama-mqa-biased-tied")]
    process = run_script(tmp_path, SCRIPT, *folders)
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        if line != "ready\n":
            process.kill()
        assert line == "ready\n", process.stderr.read()
        children = rank_processes(process.pid)
        assert len(children) == 2
        process.kill()  # the ranks are busy, and do not look at their pipes
        process.wait()
        assert until(lambda: not any(child.is_running() for child in children))
        assert not list(tmp_path.glob("lmi_multi-ranks-*"))
    finally:
        process.kill()
        process.communicate()


IDLE = """
import os, time
from lmi_multi.parallel.local import LocalRanks

class Nothing:
    def __init__(self, rank, size):
        pass

if __name__ == "__main__":
    ranks = LocalRanks(2, Nothing)
    fork = os.fork()
    if not fork:
        time.sleep(600)
        os._exit(0)
    print(fork, flush=True)
    time.sleep(600)
"""


def test_a_parent_that_is_killed_while_its_fork_lives(tmp_path: Path) -> None:
    """The ranks are idle, and their pipes stay open: the fork has inherited the other ends."""
    process = run_script(tmp_path, IDLE)
    fork = None
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line.strip().isdigit(), process.stderr.read()
        fork = psutil.Process(int(line))
        ranks = [child for child in rank_processes(process.pid) if child.pid != fork.pid]
        assert len(ranks) == 2
        process.kill()
        process.wait()
        assert until(lambda: not any(rank.is_running() for rank in ranks))
        assert fork.is_running()
        assert not list(tmp_path.glob("lmi_multi-ranks-*"))
    finally:
        process.kill()
        if fork is not None:
            fork.kill()
        process.communicate()


def test_a_script_without_main_guard(checkpoints: Path, tmp_path: Path) -> None:
    text = """
import sys
import lmi_multi

lmi_multi.load(sys.argv[1], backend="cpu", tensor_parallel=2)
"""
    process = run_script(tmp_path, text, str(checkpoint(checkpoints, "gpt2")))
    try:
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("lmi_multi.errors.RankError: rank ")
    assert last.endswith('put the call under `if __name__ == "__main__":`')


@pytest.mark.parametrize("degree", [0, -1, True, 3, 64, "2", 2.0])
def test_invalid_degrees(checkpoints: Path, degree: Any) -> None:
    with pytest.raises(OptionError, match=f"tensor_parallel is {degree!r}") as caught:
        lmi_multi.load(checkpoint(checkpoints, "gpt2"), backend="cpu", tensor_parallel=degree)
    if degree in (3, 64):
        assert str(caught.value).endswith("can be split over 1, 2, 4")
