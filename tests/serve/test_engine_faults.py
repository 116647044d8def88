"""Engines that are killed, that hang, and that compute NaN."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from lmi_multi.serve import client
from lmi_multi.serve.failures import EngineGoneError
from lmi_multi.serve.process import End
from tests.serve.running import LONG, ROOM, Running, serving
from tests.tiny_models import checkpoint

BAD = "!"  # its embedding overflows float32 inside the network


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A decoder on two ranks, with one character that it cannot compute."""
    place = tmp_path_factory.mktemp("ranks")
    folder = checkpoint(place, "gptneox", tokenizer=True)
    tensors = load_file(folder / "model.safetensors")
    row = tensors["gpt_neox.embed_in.weight"][ord(BAD) + 3]  # a byte tokenizer's id
    row[::2], row[1::2] = 3.4e38, -3.4e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    options = ("--dtype", "fp32", "--tensor-parallel", "2", "--step-timeout", "10")
    with serving(place, str(folder), *options) as server:
        server.wait_ready()
        yield server


def members(engine: psutil.Process) -> list[psutil.Process]:
    """The engine's processes."""
    return [engine, *engine.children(recursive=True)]


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, 60)[1]


def test_nan_fails_its_own_request_only(ranks: Running) -> None:
    body = {"max_new_tokens": 40, "ignore_eos": True}

    def ask(text: str) -> tuple[int, str]:
        answer = ranks.post("/invocations", {"inputs": text, "parameters": body})
        return answer.status_code, answer.text

    before = ranks.gauge("lmi_numerical_errors_total")
    done = ranks.gauge('lmi_requests_total{outcome="done"}')
    failed = ranks.gauge('lmi_requests_total{outcome="failed"}')
    alone = ask("ab")
    with ThreadPoolExecutor(6) as pool:
        beside, bad = pool.map(ask, ["ab"] * 3 + ["ab" * 9 + BAD] * 3), {ask(BAD)}
        answers = list(beside)
    assert alone[0] == 200 and answers[:3] == [alone] * 3
    [(status, text)] = bad | set(answers[3:])
    assert status == 500 and "numerical_error: logits of generated token 0 hold NaN" in text
    assert ranks.gauge("lmi_numerical_errors_total") == before + 4
    assert ranks.gauge('lmi_requests_total{outcome="done"}') == done + 4
    assert ranks.gauge('lmi_requests_total{outcome="failed"}') == failed + 4
    lines = ranks.post("/invocations", {"inputs": BAD, "stream": True}).text.splitlines()
    assert "numerical_error" in json.loads(lines[-1])["error"]
    assert ranks.ping() == 200 and ranks.gauge("lmi_engine_restarts") == 0


def test_a_rank_that_hangs_ends_the_group(ranks: Running) -> None:
    engine = ranks.engine()
    processes = members(engine)
    [rank, *_] = [p for p in processes if "multiprocessing.spawn" in " ".join(p.cmdline())]
    rank.suspend()
    start = time.monotonic()
    answer = ranks.post("/invocations", {"inputs": "ab"})
    assert 9 < time.monotonic() - start < 30
    assert answer.status_code == 503 and "said nothing for 10 s" in answer.text
    assert ranks.ping() == 503
    assert gone(processes)
    ranks.wait_ready()
    assert ranks.post("/invocations", {"inputs": "ab"}).status_code == 200


def test_a_rank_that_dies_is_noticed_at_once(ranks: Running) -> None:
    processes = members(ranks.engine())
    [rank, *_] = [p for p in processes if "multiprocessing.spawn" in " ".join(p.cmdline())]
    restarts = ranks.gauge("lmi_engine_restarts")
    start = time.monotonic()
    rank.kill()  # while nobody asks anything
    ranks.until(lambda: ranks.ping() == 503)
    assert time.monotonic() - start < 2
    assert gone(processes)
    ranks.wait_ready()
    assert ranks.gauge("lmi_engine_restarts") == restarts + 1


def test_an_engine_that_is_killed_is_replaced(tmp_path: Path) -> None:
    options = ("--max-batch=2", ROOM)
    with serving(tmp_path, "demo", *options) as server, ThreadPoolExecutor(2) as pool:
        server.wait_ready()
        pending = pool.submit(server.post, "/invocations", LONG)
        stream = pool.submit(server.post, "/invocations", LONG | {"stream": True})
        server.until(lambda: server.gauge("lmi_batch_rows") == 2)
        engine = server.engine()
        start = time.monotonic()
        engine.kill()
        server.until(lambda: server.ping() == 503)
        answer = pending.result(60)
        last = stream.result(60).text.splitlines()[-1]
        assert time.monotonic() - start < 2
        assert answer.status_code == 503 and "killed by signal 9" in answer.text
        assert int(answer.headers["retry-after"]) >= 1
        assert "killed by signal 9" in json.loads(last)["error"]
        waiting = server.post("/invocations", {"inputs": "ten"})
        assert waiting.status_code == 503 and "is being started" in waiting.text
        assert gone([engine])
        server.wait_ready()
        answer = server.post("/invocations", {"inputs": "ten"})
        assert answer.json() == {"generated_text": "10"}
        assert server.gauge("lmi_engine_restarts") == 1 and server.gauge("lmi_batch_rows") == 0


class Mute:
    """In place of an engine's process: it is ready at once, and then says nothing."""

    def __init__(self, load: Any, handle: Callable[[Any], None], log_format: str) -> None:
        self.ended: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        handle({"type": "ready"})

    def send(self, message: Any) -> None:
        """Nobody listens."""

    def kill(self) -> None:
        """Nobody is there."""


def test_a_server_that_was_stopped_has_not_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its engine said meanwhile it may still have to read."""
    looks = 0

    def monotonic() -> float:
        nonlocal looks
        looks += 1
        return 1000.0 * looks  # it is stopped at every look

    monkeypatch.setattr(client, "time", SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(client, "LOOK", 0.01)
    monkeypatch.setattr(client, "EngineProcess", Mute)

    async def ask() -> None:
        engine = client.EngineClient({}, step_timeout=0.1, startup_timeout=0.1)
        await engine.start()
        await engine.started()
        async for _ in engine.invoke(b"a", {}, 60):
            raise AssertionError("it is mute")

    with pytest.raises(EngineGoneError, match=r"it said nothing for 0\.1 s"):
        asyncio.run(ask())
    assert looks > 2 * 5  # a look counts for two of its own length


def test_a_server_that_is_killed_takes_its_engine_along(ranks: Running) -> None:
    processes = members(ranks.engine())
    ranks.process.kill()
    ranks.process.wait(60)
    assert gone(processes)
