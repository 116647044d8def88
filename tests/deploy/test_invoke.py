"""`lmi-multi invoke` against a stand-in of SageMaker's runtime before a real server of ours."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

import lmi_multi
from lmi_multi.cli.main import run
from lmi_multi.deploy.invoke import invoke, stream
from lmi_multi.errors import AwsError, OptionError
from tests import runtime_server
from tests.moto_server import Moto
from tests.runtime_server import Runtime
from tests.serve.running import Running

PROMPTS = ["twenty two dollars", "the third of march nineteen ninety nine"]


@pytest.fixture
def runtime(aws: Moto, demo_server: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """An endpoint `demo`."""
    with runtime_server.serve() as own:
        own.endpoints["demo"] = str(demo_server.client.base_url)
        monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME", own.url)
        yield own


@pytest.fixture(scope="module")
def expected() -> list[str | None]:
    with lmi_multi.load("demo", backend="cpu") as model:
        return [c.text for c in model.generate(PROMPTS)]


def test_answers(runtime: Runtime, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["invoke", "demo", *PROMPTS]) == 0
    assert capsys.readouterr().out.splitlines() == expected
    assert runtime.headers[0]["Authorization"].startswith("AWS4-HMAC-SHA256 Credential=test/")

    assert run(["invoke", "demo", PROMPTS[0], "--json", "--max-new-tokens", "2"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert expected[0].startswith(shown["generated_text"])
    assert len(shown["details"]["tokens"]) == 2 and shown["details"]["finish_reason"] == "length"


def test_token_ids_and_options(
    runtime: Runtime, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with lmi_multi.load("demo", backend="cpu") as model:
        [found] = model.generate(PROMPTS[:1], num_beams=2)
        ids = ",".join(map(str, found.prompt_token_ids))
    assert run(["invoke", "demo", "--token-ids", ids, "-o", "num_beams=2"]) == 0
    assert capsys.readouterr().out == f"{found.text}\n"


def test_a_stream(
    runtime: Runtime, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["invoke", "demo", PROMPTS[0], "--stream"]) == 0
    assert capsys.readouterr().out == f"{expected[0]}\n"
    assert run(["invoke", "demo", PROMPTS[0], "--stream", "--json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(event["token"]["text"] for event in events) == expected[0]
    assert events[-1]["generated_text"] == expected[0] and len(events) > 1


def test_what_the_container_refuses(runtime: Runtime, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--stream"]):
        assert run(["invoke", "demo", "--token-ids", "1000000", *more]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: endpoint demo: the container answers 400: ")
        assert "token id 1000000, must be 0 to" in error


def test_an_endpoint_that_is_not_there(runtime: Runtime) -> None:
    with pytest.raises(AwsError, match="endpoint other: ValidationError: Endpoint other of acco"):
        invoke("other", {"inputs": "a"})
    with pytest.raises(OptionError, match="name is 'a/b'; allowed"):
        invoke("a/b", {"inputs": "a"})


def test_a_stream_that_breaks_off(runtime: Runtime) -> None:
    runtime.cut = 20
    events = stream("demo", {"inputs": PROMPTS[0]})
    assert "token" in next(events)
    with pytest.raises(AwsError, match=r"no JSON|ends before its answer does"):
        list(events)
    runtime.cut, runtime.fault = 0, json.dumps({"Message": "gone", "ErrorCode": "X"}).encode()
    with pytest.raises(AwsError, match="endpoint demo: ModelStreamError: gone"):
        list(stream("demo", {"inputs": PROMPTS[0]}))
    runtime.fault = None
    with pytest.raises(AwsError, match="ends before its answer does"):
        list(stream("demo", {"inputs": PROMPTS[0]}))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a", "b", "--stream"], "--stream is given with 2 prompts; allowed: one"),
        (["a", "-o", "topk=1"], "did you mean 'top_k'"),
        (["a", "--token-ids", "1"], "prompts come from one place"),
    ],
)
def test_bad_usage(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["invoke", "demo", *args]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and not shown.out
