"""What goes wrong around a server that runs: clients that leave, overload, signals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serve.running import LONG, Running, serving


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("faults"), "demo", "--max-batch", "2") as running:
        running.wait_ready()
        yield running


@pytest.fixture
def server(shared: Running) -> Running:
    """The server with nothing to do: the engine tells of its rows a step late."""
    shared.until(lambda: shared.gauge("lmi_in_flight") == shared.gauge("lmi_batch_rows") == 0)
    return shared


def test_a_client_that_leaves_a_stream_frees_its_place(server: Running) -> None:
    with server.client.stream("POST", "/invocations", json=LONG | {"stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert server.gauge("lmi_in_flight") == 1
    server.until(lambda: server.gauge("lmi_in_flight") == 0)
    server.until(lambda: server.gauge("lmi_batch_rows") == 0)
    server.until(lambda: server.gauge('lmi_requests_total{outcome="aborted"}') >= 1)


def test_a_client_that_leaves_before_its_answer_frees_its_place(server: Running) -> None:
    aborted = 'lmi_requests_total{outcome="aborted"}'
    before = server.gauge(aborted)
    with server.asking("/invocations", LONG):
        server.until(lambda: server.gauge("lmi_in_flight") == 1)
    server.until(lambda: server.gauge("lmi_in_flight") == 0)
    server.until(lambda: server.gauge(aborted) == before + 1)


@pytest.mark.parametrize("path", ["/invocations", "/v1/completions"])
def test_a_client_that_leaves_while_it_waits_frees_its_place(server: Running, path: str) -> None:
    with server.asking("/invocations", LONG), server.asking("/invocations", LONG):
        server.until(lambda: server.gauge("lmi_batch_rows") == 2)
        waiting = {"prompt": "ten"} if path == "/v1/completions" else {"inputs": "ten"}
        with server.asking(path, waiting | {"stream": True}):
            server.until(lambda: server.gauge("lmi_queue") == 1)
        server.until(lambda: server.gauge("lmi_in_flight") == 2)
        assert server.gauge("lmi_batch_rows") == 2
    server.until(lambda: server.gauge("lmi_in_flight") == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_place_is_free_within_two_steps(server: Running, stream: bool) -> None:
    engine = server.engine()
    with server.asking("/invocations", LONG | {"stream": stream}) as connection:
        server.until(lambda: server.gauge("lmi_batch_rows") == 1)
        if stream:
            assert connection.recv(1)
        engine.suspend()  # so that the steps from here on can be counted
    try:
        server.until(lambda: server.gauge("lmi_in_flight") == 0)
        before = server.gauge("lmi_engine_steps")
    finally:
        engine.resume()
    server.until(lambda: server.gauge("lmi_batch_rows") == 0)
    assert 0 < before <= server.gauge("lmi_engine_steps") <= before + 2


def test_a_full_queue_is_refused(tmp_path: Path) -> None:
    # A prompt's bytes count before it is tokenized: 400 are about 100 tokens.
    with serving(tmp_path, "demo", "--max-queue", "2", OPTION_MAX_QUEUE_TOKENS="100") as server:
        server.wait_ready()
        many = server.post("/invocations", {"inputs": ["ten"] * 3})
        assert many.status_code == 400 and "3 prompts are given; allowed: 1 to 2" in many.text
        with server.asking("/invocations", LONG):
            server.until(lambda: server.gauge("lmi_in_flight") == 1)
            for inputs in ("a" * 400, ["ten", "ten"]):
                answer = server.post("/invocations", {"inputs": inputs})
                assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
            with server.asking("/invocations", LONG):
                server.until(lambda: server.gauge("lmi_in_flight") == 2)
                answer = server.post("/v1/completions", {"prompt": "ten"})
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert "2 requests are being answered" in answer.json()["error"]["message"]
        assert server.gauge("lmi_shed_requests_total") == 3
        server.until(lambda: server.gauge("lmi_in_flight") == 0)
        assert server.post("/invocations", {"inputs": "a" * 100}).status_code == 200


def test_sigterm_under_load(tmp_path: Path) -> None:
    fixed = {"max_new_tokens": 100, "min_new_tokens": 100, "ignore_eos": True}
    body = {"inputs": "ten", "parameters": fixed}

    def whole() -> str:
        answer = server.post("/invocations", body)
        assert answer.status_code == 200
        return str(answer.json()["generated_text"])

    def streamed() -> str:
        with server.client.stream("POST", "/invocations", json=body | {"stream": True}) as answer:
            lines = [json.loads(line) for line in answer.iter_lines() if line]
        assert len(lines) == 100
        return str(lines[-1]["generated_text"])

    def refused() -> bool:
        try:
            with server.asking("/invocations", {"inputs": "ten"}) as connection:
                head = connection.recv(1000)
        except ConnectionError:
            return True
        assert head.startswith(b"HTTP/1.1 503") or not head
        assert not head or b"retry-after" in head.lower()
        return True

    with serving(tmp_path, "demo", "--max-batch", "4") as server:
        server.wait_ready()
        with ThreadPoolExecutor(24) as pool:
            tasks = [pool.submit(ask) for ask in [whole, streamed] * 12]
            server.until(lambda: server.gauge("lmi_in_flight") == 24)
            start = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            server.until(lambda: server.ping() != 200)
            assert refused()
            assert server.process.wait(40) == 0
            assert time.monotonic() - start < 25
            assert len({task.result(5) for task in tasks}) == 1


def test_sigterm_tells_those_that_are_cut(tmp_path: Path) -> None:
    with serving(tmp_path, "demo", "--drain-timeout", "3") as server:
        server.wait_ready()
        with server.client.stream("POST", "/invocations", json=LONG | {"stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert "shutting down" in json.loads(last)["error"]
        assert server.process.wait(10) == 0


def test_a_file_of_properties_is_all_it_needs(tmp_path: Path) -> None:
    properties = tmp_path / "serving.properties"
    properties.write_text(
        "engine=FasterTransformer\noption.model_id=demo\noption.tensor_parallel_degree=1\n"
        "option.enable_streaming=true\noption.output_formatter=sse\n"
    )
    command = [sys.executable, "-m", "lmi_multi", "serve", "--properties", str(properties)]
    with serving(tmp_path, f"--properties={properties}") as server:
        server.wait_ready()
        answer = server.post("/invocations", {"inputs": "ten"})
        events = [line for line in answer.text.splitlines() if line]
        assert all(event.startswith("data: ") for event in events)
        assert json.loads(events[-1][6:])["generated_text"] == "10"
        whole = server.post("/invocations", {"inputs": "ten", "stream": False})
        assert whole.json() == {"generated_text": "10"}
    for line, message in (
        ("option.dtyp=fp32", "option.dtype"),
        ("option.multi_model=true", "option.model_id is 'demo'; allowed: none beside multi_model"),
    ):
        properties.write_text(f"option.model_id=demo\n{line}\n")
        failed = subprocess.run(command, capture_output=True, text=True)
        assert failed.returncode == 2
        assert message in failed.stderr.strip().splitlines()[-1]
