"""A script of the user's own behind the server: what it gets, and what becomes of what it does."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import pytest

from lmi_multi import fastertransformer
from lmi_multi.checkpoint.source import Source
from lmi_multi.errors import LmiError
from lmi_multi.serve import script
from lmi_multi.serve.script import serve_script
from tests.serve.running import Running, serving

# Written the way of AWS's posts on DJL Serving with FasterTransformer.
POST = """
import logging

import fastertransformer as ft
from djl_python import Input, Output

model = None


def load_model(properties):
    tensor_parallel_degree = int(properties["tensor_parallel_degree"])
    pipeline_parallel_degree = int(properties["pipeline_parallel_degree"])
    model_location = properties["model_dir"]
    if "model_id" in properties:
        model_location = properties["model_id"]
    dtype = properties.get("dtype", "fp32")
    logging.info(f"Loading model in {model_location}")
    return ft.init_inference(
        model_location, tensor_parallel_degree, pipeline_parallel_degree, dtype
    )


def pipeline_generate(texts, parameters):
    return model.pipeline_generate(texts, **parameters)


def handle(inputs: Input):
    global model
    if not model:
        model = load_model(inputs.get_properties())
    if inputs.is_empty():
        # Model server makes an empty call to warmup the model on startup
        return None
    data = inputs.get_as_json()
    result = pipeline_generate(data["inputs"], data.get("parameters", {}))
    return Output().add_as_json([{"generated_text": text} for text in result])
"""

# One case each of what a script may do.
CASES = """
import os, sys, time

import helper
from djl_python.inputs import Input
from djl_python.outputs import Output
from lmi_multi.errors import CapacityError, OptionError

loads = []


def stream(count, folder):
    try:
        for number in range(count):
            yield {"number": number}
            time.sleep(0.01)
    finally:
        with open(folder + "/ended", "w") as file:
            file.write(str(number))


def broken_stream():
    yield {"number": 0}
    raise ValueError("half way")


def handle(inputs):
    properties = inputs.get_properties()
    if inputs.is_empty():
        loads.append(1)
        return None
    if inputs.get_property("Content-Type") == "text/plain":
        return Output().add(inputs.get_as_string()[::-1])
    asked = inputs.get_as_json()
    case = asked["case"]
    if case == "echo":
        return Output().add_as_json({"properties": properties, "loads": len(loads),
            "batches": len(inputs.get_batches()), "helper": helper.VALUE, "pid": os.getpid()})
    if case == "bytes":
        return Output(201).add_property("Content-Type", "image/x").add(b"\\xff\\x00")
    if case == "error":
        return Output().error("not this one", code=422, message="no")
    if case == "raise":
        return {}["secret"]
    if case == "memory":
        raise CapacityError("no room")
    if case == "option":
        raise OptionError("x is 1; allowed: 2")
    if case == "none":
        return None
    if case == "dict":
        return {"a": 1}
    if case == "code":
        return Output(code=99).add("x")
    if case == "204":
        return Output(code=204).add("x")
    if case == "204 stream":
        return Output(code=204).add_stream_content(iter(["x"]))
    if case == "header":
        return Output().add("x").add_property("x", "a\\r\\nb: c")
    if case == "two":
        return Output().add("x", key="a").add("y", key="b")
    if case == "stream":
        return Output().add_stream_content(stream(asked["count"], properties["model_dir"]))
    if case == "sse":
        return Output().add_stream_content(iter([{"a": 1}]), output_formatter="sse")
    if case == "broken stream":
        return Output().add_stream_content(broken_stream())
    if case == "finalize":
        place = properties["model_dir"] + "/final"
        return Output().add("x").finalize(lambda text: open(place, "w").write(text), "done")
    if case == "finalize badly":
        return Output().add("y").finalize(lambda: 1 / 0)
    if case == "sleep":
        time.sleep(asked["seconds"])
    if case == "wait":
        while not os.path.exists(properties["model_dir"] + "/go"):
            time.sleep(0.01)
    if case in ("note", "wait"):
        with open(properties["model_dir"] + "/noted", "a") as file:
            file.write(asked["name"])
        return Output().add("noted")
    if case == "exit":
        sys.exit(3)
    print("a line that is no answer")
    return Output().add("unknown case")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("script")
    (place / "model.py").write_text(CASES)
    (place / "helper.py").write_text("VALUE = 'beside'\n")
    (place / "serving.properties").write_text(
        "engine=Python\noption.entryPoint=model.py\noption.dtype=int8\n"
        "option.max_rolling_batch_size=7\noption.predict_timeout=8\n"
    )
    return place


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with serving(folder, str(folder)) as running:
        running.wait_ready()
        yield running


def test_a_script_of_the_post_runs_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(POST)
    (tmp_path / "serving.properties").write_text(
        "engine=FasterTransformer\noption.model_id=demo\noption.entryPoint=model.py\n"
        "option.tensor_parallel_degree=1\noption.dtype=fp32\n"
    )
    prompts = ["twenty two dollars", "ten kilometers"]
    with serving(tmp_path, f"--properties={tmp_path / 'serving.properties'}") as server:
        server.wait_ready()
        answer = server.post("/invocations", {"inputs": prompts, "parameters": {"max_seq_len": 30}})
        refused = server.post("/invocations", {"inputs": ["a"], "parameters": {"top_p": 7}})
        assert server.client.get("/v1/models").status_code == 404
        assert server.stop() == 0
    theirs = fastertransformer.init_inference("demo", 1, 1, backend="cpu")
    expected = theirs.pipeline_generate(prompts, max_seq_len=30)
    assert answer.json() == [{"generated_text": text} for text in expected]
    assert refused.status_code == 400 and "top_p" in refused.json()["error"]


def test_what_it_is_given(server: Running, folder: Path) -> None:
    headers = {"x-own": "1", "model_dir": "/etc", "authorization": "Bearer key"}
    found = server.post("/invocations", {"case": "echo"}, headers=headers).json()
    given = found["properties"]
    assert (found["loads"], found["batches"], found["helper"]) == (1, 1, "beside")
    assert found["pid"] == server.engine().pid != server.process.pid
    assert given["model_dir"] == given["model_id"] == str(folder)  # not the header's
    assert (given["dtype"], given["max_rolling_batch_size"]) == ("int8", "7")
    assert (given["tensor_parallel_degree"], given["pipeline_parallel_degree"]) == ("1", "1")
    assert given["x-own"] == "1" and given["content-type"] == "application/json"
    assert "authorization" not in given and "entryPoint" not in given


def test_forms_of_answers(server: Running, folder: Path) -> None:
    text = server.client.post(
        "/invocations", content="héllo", headers={"content-type": "text/plain"}
    )
    assert text.text == "olléh" and text.headers["content-type"] == "text/plain; charset=utf-8"
    data = server.post("/invocations", {"case": "bytes"})
    assert (data.status_code, data.content) == (201, b"\xff\x00")
    assert data.headers["content-type"] == "image/x"
    error = server.post("/invocations", {"case": "error"})
    assert error.status_code == 422 and error.json()["error"] == "not this one"
    nothing = server.post("/invocations", {"case": "none"})
    assert (nothing.status_code, nothing.content) == (204, b"")
    assert server.post("/invocations", {"case": "finalize"}).text == "x"
    assert server.post("/invocations", {"case": "finalize badly"}).text == "y"
    server.until(lambda: (folder / "final").exists() and (folder / "final").read_text() == "done")


@pytest.mark.parametrize(
    ("case", "status", "message"),
    [
        ("raise", 424, "model.py failed with KeyError: 'secret'"),
        ("memory", 507, "model.py failed with CapacityError: no room"),
        ("option", 400, "x is 1; allowed: 2"),
        ("dict", 424, "handle returned a dict; allowed: Output or None"),
        ("code", 424, "the output's code is 99; allowed"),
        ("204", 424, "the output's code is 204, which goes without content"),
        ("204 stream", 424, "the output's code is 204, which goes without content"),
        ("header", 424, "the output's property 'x' is 'a\\r\\nb: c': no header"),
        ("two", 424, "the output has 2 contents; allowed: one, or one 'data'"),
    ],
)
def test_failures_are_clear_answers(case: str, status: int, message: str, server: Running) -> None:
    answer = server.post("/invocations", {"case": case})
    assert answer.status_code == answer.json()["code"] == status
    assert message in answer.json()["error"] and "Traceback" not in answer.text
    assert server.post("/invocations", {"case": "?"}).text == "unknown case"


def test_what_is_no_request(server: Running) -> None:
    assert server.client.post("/invocations").status_code == 400
    answer = server.client.post("/invocations", content=b"{")
    assert answer.status_code == 424 and "JSONDecodeError" in answer.json()["error"]


def test_streams(server: Running, folder: Path) -> None:
    answer = server.post("/invocations", {"case": "stream", "count": 5})
    assert answer.headers["content-type"] == "application/jsonlines"
    assert [json.loads(line)["number"] for line in answer.text.splitlines()] == [0, 1, 2, 3, 4]
    events = server.post("/invocations", {"case": "sse"})
    assert events.text == 'data: {"a": 1}\n\n'
    assert events.headers["content-type"].startswith("text/event-stream")
    broken = server.post("/invocations", {"case": "broken stream"}).text.splitlines()
    assert json.loads(broken[0]) == {"number": 0}
    assert json.loads(broken[1]) == {
        "error": "model.py failed with ValueError: half way",
        "code": 424,
    }


def test_a_client_that_leaves_a_stream_ends_it(server: Running, folder: Path) -> None:
    (folder / "ended").unlink(missing_ok=True)
    body = {"case": "stream", "count": 100_000}
    with server.client.stream("POST", "/invocations", json=body) as answer:
        next(answer.iter_lines())
    server.until(lambda: (folder / "ended").exists())
    server.until(lambda: server.gauge("lmi_in_flight") == server.gauge("lmi_batch_rows") == 0)
    assert int((folder / "ended").read_text()) < 99_999


def test_one_at_a_time_and_each_its_own(server: Running) -> None:
    def ask(number: int) -> str:
        return server.client.post(
            "/invocations", content=f"{number}-abc", headers={"content-type": "text/plain"}
        ).text

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(40))) == [f"{n}-abc"[::-1] for n in range(40)]
    assert server.gauge("lmi_in_flight") == 0


def test_a_request_that_left_the_queue_is_not_run(server: Running, folder: Path) -> None:
    for name in ("noted", "go"):
        (folder / name).unlink(missing_ok=True)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.post, "/invocations", {"case": "wait", "name": "a"})
        server.until(lambda: server.gauge("lmi_batch_rows") == 1)
        with server.asking("/invocations", {"case": "note", "name": "b"}):
            server.until(lambda: server.gauge("lmi_in_flight") == 2)
        server.until(lambda: server.gauge("lmi_in_flight") == 1)  # the client gave up
        (folder / "go").touch()
        assert first.result().text == "noted"
    assert server.post("/invocations", {"case": "note", "name": "c"}).text == "noted"
    assert (folder / "noted").read_text() == "ac"


def test_a_script_that_ends_its_process_is_started_again(server: Running) -> None:
    before = server.engine().pid
    answer = server.post("/invocations", {"case": "exit"})
    assert answer.status_code == 503 and "SystemExit" in answer.json()["error"]
    server.until(lambda: server.ping() == 200)
    assert server.post("/invocations", {"case": "echo"}).json()["pid"] != before


def test_a_call_that_hangs_is_ended(server: Running) -> None:
    restarts, start = server.gauge("lmi_engine_restarts"), time.monotonic()
    answer = server.post("/invocations", {"case": "sleep", "seconds": 1000})
    assert answer.status_code in (503, 504) and time.monotonic() - start < 40
    server.until(lambda: server.gauge("lmi_engine_restarts") > restarts and server.ping() == 200)
    assert server.post("/invocations", {"case": "?"}).text == "unknown case"


def test_a_script_that_cannot_start_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("def handle(inputs):\n    raise ValueError('no model')")
    with serving(tmp_path, "demo", "--entry-point", str(tmp_path / "model.py")) as server:
        assert server.process.wait(120) == 1
    assert server.log.read_text().strip().splitlines()[-1] == "error: ValueError: no model"


@contextlib.contextmanager
def in_process() -> Iterator[tuple[Connection, Connection]]:
    """A pipe to talk to a script that is run here, and that leaves nothing behind."""
    ours, theirs = Pipe()
    with ours, theirs, mock.patch.dict(sys.modules), mock.patch.object(sys, "path", [*sys.path]):
        yield ours, theirs


def test_a_model_on_s3_is_downloaded_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.py").write_text(
        "def handle(inputs):\n    raise LookupError(inputs.get_property('model_id'))\n"
    )
    fetched = Source("s3://bucket/model", tmp_path / "fetched", "local-1")
    monkeypatch.setattr(script, "resolve", {"s3://bucket/model": fetched}.__getitem__)
    with in_process() as (_, theirs), pytest.raises(LookupError, match=str(tmp_path / "fetched")):
        serve_script(theirs, str(tmp_path / "model.py"), {"model_id": "s3://bucket/model"})


def test_what_is_no_handler(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("def other(inputs): ...")
    with in_process() as (ours, theirs):
        with pytest.raises(LmiError, match=r"other.py has no function handle\(inputs\)"):
            serve_script(theirs, str(tmp_path / "other.py"), {})
        assert not ours.poll()


def test_the_stand_in_is_the_script_s_alone() -> None:
    assert importlib.util.find_spec("djl_python") is None
    assert importlib.util.find_spec("fastertransformer") is None
