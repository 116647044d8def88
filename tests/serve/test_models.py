"""SageMaker's multi-model mode on a real port: models come, answer and go."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
from fastapi import FastAPI

import lmi_multi
from lmi_multi import demo
from lmi_multi.serve import models
from lmi_multi.serve.errors import HttpError
from lmi_multi.serve.failures import EngineGoneError
from lmi_multi.serve.metrics import Metrics
from lmi_multi.serve.served import Served
from lmi_multi.serve.settings import ServeSettings
from lmi_multi.serve.tracing import Tracing
from tests.serve.running import LENGTH, LONG, Running, serving
from tests.tiny_models import checkpoint


@pytest.fixture(scope="module")
def root(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models as SageMaker lays them out: ROOT/NAME/model."""
    place = tmp_path_factory.mktemp("models")
    shutil.copytree(demo.CHECKPOINT, place / "numbers" / "model")
    tiny = checkpoint(checkpoints, "t5", tokenizer=True)
    for name, properties in (
        ("tiny", "option.dtype=fp32\noption.max_rolling_batch_size=3\n"),
        ("huge", "option.max_model_len=2000000000\n"),  # its cache would take terabytes
        ("slip", "option.dtyp=fp32\n"),
        ("named", f"option.model_id={demo.CHECKPOINT}\noption.max_rolling_batch_size=3\n"),
        ("code", "option.entryPoint=model.py\n"),
        ("long", f"option.model_id={demo.CHECKPOINT}\noption.max_model_len={LENGTH + 1000}\n"),
    ):
        shutil.copytree(tiny, place / name / "model")
        (place / name / "model" / "serving.properties").write_text(properties)
    (place / "code" / "model" / "model.py").write_text("raise SystemExit('it ran')")
    (place / "empty" / "model").mkdir(parents=True)
    (place / "out").mkdir()
    (place / "out" / "model").symlink_to(tiny)
    (place.parent / "model").symlink_to(tiny)
    return place


@pytest.fixture(scope="module")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("server")
    options = ("--models-root", str(root), "--backend=cpu", "--drain-timeout=12")
    with serving(place, "--multi-model", *options, SAGEMAKER_MULTI_MODEL="true") as running:
        running.wait_ready()
        yield running


@pytest.fixture(autouse=True)
def _nothing_loaded(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    server: Running = request.getfixturevalue("server")
    if server.process.poll() is None:
        for name in names(server):
            server.client.delete(f"/models/{name}")


def load(server: Running, root: Path, name: str, folder: str | None = None) -> httpx.Response:
    return server.post(
        "/models", {"model_name": name, "url": str(root / (folder or name) / "model")}
    )


def engines(server: Running) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children()
    return [c for c in children if "lmi_multi.serve.worker" in c.cmdline()]


def names(server: Running) -> list[str]:
    return [entry["modelName"] for entry in server.client.get("/models").json()["models"]]


def test_models_come_answer_and_go(server: Running, root: Path) -> None:
    assert server.client.get("/models").json() == {"models": []}
    assert server.ping() == 200 and engines(server) == []
    with ThreadPoolExecutor(3) as pool:
        wanted = ["numbers", "numbers", "tiny"]
        answers = [*pool.map(lambda name: load(server, root, name).status_code, wanted)]
    assert sorted(answers[:2]) == [200, 409] and answers[2] == 200
    url = str(root / "tiny" / "model")
    assert server.client.get("/models/tiny").json() == {"modelName": "tiny", "modelUrl": url}
    assert names(server) == ["numbers", "tiny"] and len(engines(server)) == 2
    with lmi_multi.load("demo", backend="cpu") as model:
        expected = model.generate("twenty two dollars", max_new_tokens=30)[0].text
    with lmi_multi.load(url, backend="cpu", dtype="fp32") as model:
        other = model.generate("twenty two dollars", max_new_tokens=30)[0].text
    headers = {"x-amzn-sagemaker-target-model": "numbers.tar.gz"}
    body = {"inputs": "twenty two dollars"}
    found = server.post("/models/numbers/invoke", body, headers=headers)
    assert found.json() == {"generated_text": expected}
    assert server.post("/models/tiny/invoke", body).json() == {"generated_text": other}
    assert other != expected
    wrong = server.post("/models/tiny/invoke", {"inputs": "a", "parameters": {"num_beams": 4}})
    assert wrong.status_code == 400 and "at most 3" in wrong.text  # its own file's limit
    # One is told to go, and first ends what it was asked.
    with ThreadPoolExecutor(2) as pool:
        with server.standing(*engines(server)):
            pending = pool.submit(server.post, "/models/numbers/invoke", body)
            server.until(lambda: server.gauge("lmi_in_flight") == 1)
            gone = pool.submit(server.client.delete, "/models/numbers")
            server.until(lambda: names(server) == ["tiny"])
        assert pending.result().json() == {"generated_text": expected}
        assert gone.result().status_code == 200
    assert names(server) == ["tiny"] and len(engines(server)) == 1
    assert server.post("/models/numbers/invoke", body).status_code == 404
    # What an engine's death takes along comes back by itself.
    engines(server)[0].kill()
    server.until(lambda: server.gauge("lmi_engine_restarts") == 1)
    server.until(lambda: server.gauge("lmi_engine_ready") == 1)
    assert server.post("/models/tiny/invoke", body).json() == {"generated_text": other}


def test_a_request_whose_body_still_comes_is_answered_first(server: Running, root: Path) -> None:
    """A model that is told to go meanwhile waits for it."""
    assert load(server, root, "numbers").status_code == 200
    body = b'{"inputs": "ten"}'
    head = f"POST /models/numbers/invoke HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n"
    address = server.client.base_url.host, server.client.base_url.port or 0
    with (
        socket.create_connection(address, timeout=60) as connection,
        ThreadPoolExecutor(1) as pool,
    ):
        connection.sendall(f"{head}Expect: 100-continue\r\nConnection: close\r\n\r\n".encode())
        assert b" 100 " in connection.recv(100)  # somebody reads the body
        gone = pool.submit(server.client.delete, "/models/numbers")
        server.until(lambda: "numbers" not in names(server))
        connection.sendall(body)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert gone.result().status_code == 200
    assert b" 200 OK" in answer and answer.endswith(b'{"generated_text":"10"}')


def test_an_answer_that_is_there_needs_no_engine() -> None:
    """A model that is unloaded, or dies, between its last token and the answer's last word."""
    settings = ServeSettings(model="demo")
    service = Served(settings, Metrics(list, Tracing(FastAPI()))).service
    assert service is not None and service.tokenizer is None
    with lmi_multi.load("demo", backend="cpu") as model:
        service.engine.reader = model._reader
    service.engine.error = "the server is shutting down"
    with pytest.raises(EngineGoneError):
        assert service.is_encoder
    assert service.tokenizer is model.tokenizer


def test_what_is_not_loaded_is_not_there(server: Running) -> None:
    for method, path in (
        ("GET", "/models/tiny"),
        ("DELETE", "/models/tiny"),
        ("POST", "/models/tiny/invoke"),
    ):
        answer = server.client.request(method, path)
        assert answer.status_code == 404 and "not loaded" in answer.json()["error"]
    for path in ("/invocations", "/v1/completions"):
        assert server.post(path, {"inputs": "a"}).status_code == 404


def test_what_does_not_fit_is_507_and_leaves_nothing(server: Running, root: Path) -> None:
    answer = load(server, root, "huge")
    assert answer.status_code == 507 and "GiB" in answer.json()["error"]
    assert names(server) == [] and engines(server) == []
    # SageMaker then makes room, and asks again; here for one whose file names its model.
    assert load(server, root, "named").status_code == 200
    found = server.post("/models/named/invoke", {"inputs": "ten"})
    assert found.json() == {"generated_text": "10"}


def test_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without engines: only the names count."""
    monkeypatch.setattr(models, "PAGE", 2)
    metrics = Metrics(list, Tracing(FastAPI()))
    several = models.Models(ServeSettings(), lambda folder: ServeSettings(), metrics)
    engine = SimpleNamespace(error=None)
    gone = SimpleNamespace(error="it ended three times")
    for name in "dbeac":
        own = SimpleNamespace(engine=gone if name == "b" else engine)
        several._loaded[name] = models._Model(f"/{name}", tmp_path, own)  # type: ignore[arg-type]
    found, token = [], ""
    while True:
        page = several.page(token)
        found.append([entry["modelName"] for entry in page["models"]])
        if "nextPageToken" not in page:
            break
        token = page["nextPageToken"]
    assert found == [["a", "c"], ["d", "e"]]
    with pytest.raises(HttpError, match="is not loaded"):
        several.entry("b")


def test_an_engine_that_is_killed_while_it_loads_lacked_memory(server: Running, root: Path) -> None:
    for _ in range(5):
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(load, server, root, "tiny")
            server.until(lambda: len(engines(server)) == 1)
            engines(server)[0].kill()  # as the kernel does when there is no memory left
            answer = pending.result()
        if answer.status_code != 200:
            break
        server.client.delete("/models/tiny")  # this one was loaded before it could be killed
    assert answer.status_code == 507 and "killed by signal 9" in answer.json()["error"]
    assert names(server) == []


@pytest.mark.parametrize(
    ("name", "folder", "status", "message"),
    [
        ("x", "empty", 500, "has no weights"),
        ("x", "slip", 400, "did you mean 'option.dtype'"),
        ("x", "code", 400, "entry_point is set; allowed: none"),
        ("x", "nothing", 400, "allowed: a folder in"),
        ("x", "..", 400, "allowed: a folder in"),
        ("x", "out", 400, "allowed: a folder in"),
        ("a/b", "tiny", 400, "model_name is 'a/b'; allowed"),
        ("", "tiny", 400, "model_name is ''; allowed"),
    ],
)
def test_what_cannot_be_loaded(
    name: str, folder: str, status: int, message: str, server: Running, root: Path
) -> None:
    answer = load(server, root, name, folder)
    assert answer.status_code == status and message in answer.json()["error"]
    assert engines(server) == [] and "Traceback" not in answer.text


@pytest.mark.parametrize(
    "body",
    [{}, {"model_name": "a"}, {"model_name": "a", "url": 1}, {"model_name": "a", "url": "\0"}],
)
def test_bodies_that_say_too_little(body: dict[str, Any], server: Running) -> None:
    assert server.post("/models", body).status_code == 400


@pytest.fixture(scope="module")
def room(server: Running, root: Path) -> int:
    """Bytes in which two engines with the tiny model fit, but not three."""
    # The first one ever converts the model, for which it takes more than the others.
    assert load(server, root, "first", "tiny").status_code == 200
    assert server.client.delete("/models/first").status_code == 200
    taken = []
    for name in ("a", "b", "c"):
        assert load(server, root, name, "tiny").status_code == 200
        taken.append(sum(engine.memory_full_info().pss for engine in engines(server)))
    for name in ("a", "b", "c"):
        assert server.client.delete(f"/models/{name}").status_code == 200
    return (taken[1] + taken[2]) // 2


def invoke(server: Running, name: str) -> int:
    return server.post(f"/models/{name}/invoke", {"inputs": "ten"}).status_code


def test_memory_evicts_what_was_idle_for_longest(room: int, root: Path, tmp_path: Path) -> None:
    """Room for two engines: the third model, and each one asked again, costs another its own."""
    options = ("--models-root", str(root), "--backend=cpu", f"--models-bytes={room}")
    options += ("--step-timeout=200", "--request-timeout=200")  # some engines stand still
    with serving(tmp_path, "--multi-model", *options) as server:
        server.wait_ready()
        for name in ("a", "b"):
            assert load(server, root, name, "tiny").status_code == 200
        assert invoke(server, "a") == 200
        first = {engine.pid for engine in engines(server)}
        assert load(server, root, "c", "tiny").status_code == 200
        assert server.gauge("lmi_evicted_models_total") == 1 and len(engines(server)) == 2
        assert names(server) == ["a", "b", "c"]  # as SageMaker knows them
        assert len(first & {engine.pid for engine in engines(server)}) == 1
        assert invoke(server, "a") == 200 and server.gauge("lmi_evicted_models_total") == 1
        assert invoke(server, "b") == 200 and server.gauge("lmi_evicted_models_total") == 2
        assert invoke(server, "a") == 200 and server.gauge("lmi_evicted_models_total") == 2
        # "a" and "b" are both asked, however long "c" takes to start: neither goes.
        with ThreadPoolExecutor(2) as pool:
            with server.standing(*engines(server)):
                pending = [pool.submit(invoke, server, name) for name in ("a", "b")]
                server.until(lambda: server.gauge("lmi_in_flight") == 2)
                answer = server.post("/models/c/invoke", {"inputs": "ten"})
            assert answer.status_code == 507 and "models_bytes" in answer.json()["error"]
            assert [own.result() for own in pending] == [200, 200]
        assert invoke(server, "c") == 200
        assert server.client.delete("/models/a").status_code == 200
        assert names(server) == ["b", "c"] and invoke(server, "a") == 404


def test_alone_a_model_may_be_too_large(root: Path, tmp_path: Path) -> None:
    options = ("--models-root", str(root), "--backend=cpu", f"--models-bytes={64 * 2**20}")
    with serving(tmp_path, "--multi-model", *options) as server:
        server.wait_ready()
        answer = load(server, root, "tiny")
        assert answer.status_code == 507 and "models_bytes" in answer.json()["error"]
        assert names(server) == [] and engines(server) == []


def test_the_server_ends_with_its_models(server: Running, root: Path) -> None:
    """The last test of this file: the server is gone then."""
    assert load(server, root, "long").status_code == 200
    left = engines(server)
    body = LONG | {"stream": True}
    with server.client.stream("POST", "/models/long/invoke", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.terminate()
        last = [line for line in lines if line][-1]
    assert "shutting down" in last
    assert server.process.wait(60) == 0
    assert not psutil.wait_procs(left, 60)[1]
