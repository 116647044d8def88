"""Ranks that torchrun starts, on one host and on two that are both this one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch._C._distributed_c10d import HashStore

import lmi_multi
from lmi_multi.backends.base import Limits
from lmi_multi.cli import main as cli
from lmi_multi.errors import OptionError, RankError
from lmi_multi.parallel import torchrun
from tests.test_cuda_ranks import need
from tests.tiny_models import checkpoint

ROOT = Path(__file__).parents[1]
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
OPTIONS: list[dict[str, Any]] = [{}, {"do_sample": True, "seed": 3}, {"num_beams": 2}]

SCRIPT = """
import json, os, sys, time
import lmi_multi

def say(*parts):  # in one write: others write to the same file
    sys.stdout.write(" ".join(map(str, parts)) + "\\n")
    sys.stdout.flush()

folder, tensor, pipeline, then = sys.argv[1:]
say("rank", os.environ["RANK"], "pid", os.getpid())
backend = os.environ["BACKEND"]
model = lmi_multi.load(
    folder, backend=backend, dtype="fp32", tensor_parallel=int(tensor),
    pipeline_parallel=int(pipeline), max_batch=2, max_tokens=120,
)
say("loaded on rank", os.environ["RANK"], "device", model.device)
prompts, options = json.loads(os.environ["ASKED"])
answers = [
    [c.token_ids for c in model.generate(prompts, max_new_tokens=12, **own)] for own in options
]
say("answers", json.dumps(answers))
if then == "close":
    model.close()
    try:
        lmi_multi.load(
            folder, backend=backend, tensor_parallel=int(tensor), pipeline_parallel=int(pipeline)
        )
    except lmi_multi.errors.OptionError as error:
        say("second:", error)
elif then == "go on":
    try:
        while True:
            model.generate(prompts, max_new_tokens=100, ignore_eos=True)
            say("going")
    except lmi_multi.errors.RankError as error:
        say("failed:", error)
        time.sleep(2)  # torchrun ends it meanwhile, or it ends by itself
        sys.exit(3)
# Else it ends as a script does that never closes its model.
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Run:
    """torchrun's processes, one for each host, and what all of them print."""

    def __init__(
        self, folder: Path, nodes: int, per_node: int, arguments: list[str], backend: str
    ) -> None:
        script = folder / "script.py"
        script.write_text(SCRIPT)
        port = _free_port()
        self.log, self.errors = folder / "log", folder / "errors"
        environ = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            "OMP_NUM_THREADS": "1",
            "ASKED": json.dumps([PROMPTS, OPTIONS]),
            "BACKEND": backend,
        }
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(8)))
        self.agents = []
        # Appended: no write may lie upon another. Errors are not whole lines at a time.
        with self.log.open("a") as log, self.errors.open("a") as apart:
            for node in range(nodes):
                if backend == "cuda":  # each host has GPUs of its own
                    own = visible.split(",")[node * per_node : (node + 1) * per_node]
                    environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
                command = [
                    *(sys.executable, "-m", "torch.distributed.run"),
                    *("--nnodes", str(nodes), "--nproc-per-node", str(per_node)),
                    *("--node-rank", str(node), "--master-addr", "127.0.0.1"),
                    *("--master-port", str(port), str(script), *arguments),
                ]
                agent = subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=apart,
                    cwd=folder,
                    env=environ,
                    start_new_session=True,
                )
                self.agents.append(agent)

    def wait(self, seconds: float = 400) -> list[int]:
        """The exit codes of torchrun itself."""
        deadline = time.monotonic() + seconds
        return [agent.wait(max(0.1, deadline - time.monotonic())) for agent in self.agents]

    def until(self, text: str, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.log.read_text():
            assert time.monotonic() < deadline, self.everything()
            time.sleep(0.05)

    def everything(self) -> str:
        """What was said, errors last."""
        return self.log.read_text() + self.errors.read_text()

    def line(self, start: str) -> str:
        """What follows `start` in the first line that begins so."""
        [first, *_] = [
            own for own in self.log.read_text().splitlines() if own.startswith(start)
        ] or [self.everything()]
        return first.removeprefix(start).strip()

    def pid(self, rank: int) -> int:
        return int(self.line(f"rank {rank} pid"))


@contextmanager
def running(
    folder: Path, nodes: int, per_node: int, *arguments: str, backend: str = "cpu"
) -> Iterator[Run]:
    """Ended whatever happens, with all that it started."""
    run = Run(folder, nodes, per_node, list(arguments), backend)
    try:
        yield run
    finally:
        for agent in run.agents:
            children = psutil.Process(agent.pid).children(True) if agent.poll() is None else []
            for process in [*children, agent]:
                process.kill()
            agent.wait()


def _expected(folder: Path, backend: str = "cpu") -> list[list[list[int]]]:
    with lmi_multi.load(folder, backend=backend, dtype="fp32", max_batch=2, max_tokens=120) as one:
        return [
            [list(c.token_ids) for c in one.generate(PROMPTS, max_new_tokens=12, **own)]
            for own in OPTIONS
        ]


@pytest.mark.parametrize(
    ("family", "nodes", "per_node", "tensor", "pipeline", "then"),
    [("t5", 1, 2, 2, 1, "close"), ("t5", 2, 1, 1, 2, "end"), ("gpt2", 2, 2, 2, 2, "close")],
)
def test_the_same_tokens_as_one_process(
    checkpoints: Path,
    tmp_path: Path,
    family: str,
    nodes: int,
    per_node: int,
    tensor: int,
    pipeline: int,
    then: str,
) -> None:
    """Only rank 0's script goes on; the others end with it, and torchrun sees no failure."""
    folder = checkpoint(checkpoints, family)
    expected = _expected(folder)
    with running(tmp_path, nodes, per_node, str(folder), str(tensor), str(pipeline), then) as run:
        codes = run.wait()
        text = run.log.read_text()
        assert codes == [0] * nodes, run.everything()
        assert json.loads(run.line("answers")) == expected
        assert text.count("loaded on rank") == 1
        if then == "close":
            assert "allowed: one a run" in run.line("second:")
        for rank in range(nodes * per_node):
            assert not psutil.pid_exists(run.pid(rank))


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("family", "nodes", "per_node", "tensor", "pipeline"),
    [("t5", 1, 2, 2, 1), ("llama", 1, 2, 1, 2), ("llama", 2, 1, 2, 1), ("t5", 2, 2, 2, 2)],
)
def test_the_same_tokens_as_one_gpu(
    checkpoints: Path,
    tmp_path: Path,
    family: str,
    nodes: int,
    per_node: int,
    tensor: int,
    pipeline: int,
) -> None:
    """Over NCCL; two hosts are one, and each sees GPUs of its own."""
    need(nodes * per_node)
    folder = checkpoint(checkpoints, family)
    given = (nodes, per_node, str(folder), str(tensor), str(pipeline), "close")
    with running(tmp_path, *given, backend="cuda") as run:
        codes = run.wait(240)
        assert codes == [0] * nodes, run.everything()
        assert json.loads(run.line("answers")) == _expected(folder, "cuda"), run.everything()


@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_model_of_its_own_in_every_process(
    checkpoints: Path, tmp_path: Path, backend: str
) -> None:
    """On the GPU of its number on its host, where there are any."""
    if backend == "cuda":
        need(2)
    folder = checkpoint(checkpoints, "gpt2")
    with running(tmp_path, 1, 2, str(folder), "1", "1", "end", backend=backend) as run:
        assert run.wait(240) == [0], run.everything()
        text = run.log.read_text()
    answers = [line for line in text.splitlines() if line.startswith("answers")]
    expected = f"answers {json.dumps(_expected(folder, backend))}"
    assert answers == [expected, expected]
    for rank in (0, 1) if backend == "cuda" else ():
        assert f"loaded on rank {rank} device cuda:{rank}" in text


def test_a_rank_on_another_host_that_dies(checkpoints: Path, tmp_path: Path) -> None:
    """It fails the call within 2 s, in one run of three: a machine may be busy for as long."""
    expected = f"rank 1 died: its connection to {socket.gethostname()} has ended"
    for attempt in range(3):
        (own := tmp_path / str(attempt)).mkdir()
        took, said = _signalled(checkpoint(checkpoints, "gpt2"), own, signal.SIGKILL)
        assert said == expected
        if took < 2:
            return
    pytest.fail(f"the last one took {took:.1f} s")


def test_a_rank_on_another_host_that_is_stopped(checkpoints: Path, tmp_path: Path) -> None:
    """Its silence fails the call within 30 s."""
    took, said = _signalled(checkpoint(checkpoints, "gpt2"), tmp_path, signal.SIGSTOP)
    assert said == "rank 1 hangs: nothing was heard for 15 s"
    assert took < 30


def _signalled(folder: Path, own: Path, what: signal.Signals) -> tuple[float, str]:
    """How long it takes until rank 0 knows what became of rank 1, and what it says. Nothing is left
    running."""
    with running(own, 2, 1, str(folder), "2", "1", "go on") as run:
        run.until("going")
        victim, caller = run.pid(1), run.pid(0)
        began = time.monotonic()
        os.kill(victim, what)
        run.until("failed:", 60)
        took, said = time.monotonic() - began, run.line("failed:")
        if what == signal.SIGSTOP:
            os.kill(victim, signal.SIGCONT)  # as its host would end it
        codes = run.wait()
        assert all(codes), codes
        deadline = time.monotonic() + 30
        while psutil.pid_exists(victim) or psutil.pid_exists(caller):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    return took, said


def test_strangers_are_turned_away() -> None:
    """Who does not know the secret is not listened to: neither one that is silent, nor one that
    sends a wrong answer, nor one that sends a pickle at once."""
    store = HashStore()
    limits = Limits(2, 100, 64, 32, 8)
    own, other = (torchrun._Hello(rank, "here", "weights", limits) for rank in (0, 1))
    found: list[Any] = []
    job = torchrun.Job(0, 2, 0, "127.0.0.1")
    caller = threading.Thread(target=lambda: found.append(torchrun._gather(job, own, store)))
    caller.start()
    address, port, secret = json.loads(store.get("caller"))
    with socket.create_connection((address, port)) as stranger:
        stranger.close()
    wrong = Client((address, port))
    wrong.send(other)
    # By an answer, or by a connection that is gone before it is read.
    with pytest.raises((AuthenticationError, ConnectionError)):
        answer_challenge(wrong, b"a guess")
        deliver_challenge(wrong, b"a guess")
    wrong.close()
    known = Client((address, port), authkey=bytes.fromhex(secret))
    known.send(other)
    caller.join(60)
    [peers] = found
    assert list(peers.values()) == [other]
    for connection in (*peers, known):
        connection.close()


def test_a_stranger_does_not_keep_rank_0_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says nothing is heard until after the time for the others to come has passed."""
    monkeypatch.setattr(torchrun, "BUILD", 2.0)
    monkeypatch.setattr(torchrun, "_HANDSHAKE", 3.0)
    store = HashStore()
    own = torchrun._Hello(0, "here", "weights", Limits(2, 100, 64, 32, 8))
    silent: list[socket.socket] = []

    def stay() -> None:
        address, port, _ = json.loads(store.get("caller"))
        with suppress(ConnectionError):  # it came too late
            silent.append(socket.create_connection((address, port)))

    stranger = threading.Thread(target=stay)
    stranger.start()
    with pytest.raises(RankError, match="rank 1 did not connect within 2 s"):
        torchrun._gather(torchrun.Job(0, 2, 0, "127.0.0.1"), own, store)
    stranger.join(60)
    for connection in silent:
        connection.close()


def test_ranks_that_load_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HashStore()
    limits = Limits(2, 100, 64, 32, 8)
    own = torchrun._Hello(0, "here", "weights a", limits)
    store_said = threading.Thread(target=lambda: _greet(store, replace(own, identity="weights b")))
    store_said.start()
    with pytest.raises(
        OptionError, match="rank 0 on here loads weights b, but rank 0 loads weights a"
    ):
        torchrun._gather(torchrun.Job(0, 2, 0, "127.0.0.1"), own, store)
    store_said.join(60)
    with pytest.raises(RankError, match=r"cannot listen at MASTER_ADDR 192\.0\.2\.1"):
        torchrun._gather(torchrun.Job(0, 2, 0, "192.0.2.1"), own, store)


def _greet(store: HashStore, hello: Any) -> None:
    address, port, secret = json.loads(store.get("caller"))
    with Client((address, port), authkey=bytes.fromhex(secret)) as known:
        known.send(hello)
        with suppress(EOFError, ConnectionResetError):
            known.recv()


def _variables(**changed: str) -> dict[str, str]:
    told = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    return told | {"MASTER_PORT": "1"} | changed


def _set(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_how_many_processes_there_must_be(
    monkeypatch: pytest.MonkeyPatch, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert torchrun.job(2, 2) is None
    _set(monkeypatch, _variables())
    assert torchrun.job(2, 2) == torchrun.Job(1, 4, 1, "127.0.0.1")
    assert torchrun.job(1, 1) is None  # every process has a model of its own
    with pytest.raises(OptionError, match=r"2 x pipeline_parallel 1 is 2, but torchrun started 4"):
        lmi_multi.load(checkpoint(checkpoints, "gpt2"), backend="cpu", tensor_parallel=2)
    assert cli.run(["serve", "demo"]) == 2
    assert "a server does not run under torchrun" in capsys.readouterr().err
    _set(monkeypatch, _variables(WORLD_SIZE="1", RANK="0"))
    assert torchrun.job(2, 2) is None
    _set(monkeypatch, _variables(RANK="one"))
    with pytest.raises(OptionError, match="RANK is 'one'; allowed: an integer"):
        torchrun.job(2, 2)
