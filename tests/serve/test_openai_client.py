"""OpenAI's own client beyond whole answers: stop strings, several answers in a stream, errors."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import openai
import pytest

import lmi_multi
from tests.serve.running import LENGTH, LONG, ROOM, Running, serving

PROMPT = "twenty two dollars"
KEY = "correct-horse-battery-staple"
FOREVER: dict[str, Any] = {
    "max_tokens": LENGTH,
    "extra_body": {"ignore_eos": True, "min_new_tokens": LENGTH},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("client")
    options = ("--max-queue=4", "--request-timeout=6", ROOM)
    with serving(place, "demo", *options, LMI_MULTI_API_KEY=KEY) as running:
        running.client.headers = {"authorization": f"Bearer {KEY}"}
        running.wait_ready()
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.client.base_url}/v1", api_key=KEY, max_retries=0) as own:
        yield own


def test_stop(client: openai.OpenAI) -> None:
    keywords: Any = {"model": "demo", "prompt": PROMPT, "temperature": 0, "max_tokens": 30}
    cut = "$"  # what is before either of them
    whole = client.completions.create(**keywords).choices[0].text
    assert whole == "$22"
    for stop in ("2", ["never", "22"]):
        found = client.completions.create(**keywords, stop=stop).choices[0]
        assert (found.text, found.finish_reason) == (cut, "stop")
        streamed = client.completions.create(**keywords, stop=stop, stream=True)
        assert "".join(chunk.choices[0].text for chunk in streamed) == cut


def test_several_answers_in_a_stream_with_logprobs(client: openai.OpenAI) -> None:
    options: Any = {"do_sample": True, "seed": 5, "temperature": 2.0, "top_k": 0, "top_p": 1.0}
    with lmi_multi.load("demo", backend="cpu") as model:
        expected = model.generate(PROMPT, options, num_return_sequences=3, max_new_tokens=9)
    texts: dict[int, str] = defaultdict(str)
    tokens: dict[int, int] = defaultdict(int)
    ends = {}
    for chunk in client.completions.create(
        model="demo",
        prompt=PROMPT,
        n=3,
        seed=5,
        temperature=2.0,
        max_tokens=9,
        logprobs=2,
        stream=True,
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                told = choice.logprobs.top_logprobs or []
                assert all(2 <= len(top) <= 3 for top in told)
                tokens[choice.index] += len(choice.logprobs.tokens or [])
            ends[choice.index] = choice.finish_reason
    assert [texts[n] for n in range(3)] == [c.text for c in expected]
    assert [tokens[n] for n in range(3)] == [len(c.token_ids) for c in expected]
    assert set(ends.values()) <= {"stop", "length"}


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "lmi_multi"


def test_errors(server: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="demo", prompt=PROMPT, n=99)
    assert wrong.value.param == "n" and "n is 99; allowed" in wrong.value.message
    assert wrong.value.request_id == wrong.value.response.headers["x-request-id"]
    with pytest.raises(openai.NotFoundError) as other:
        client.completions.create(model="gpt-4", prompt=PROMPT)
    assert other.value.param == "model"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.APIStatusError) as large:
        client.completions.create(model="demo", prompt="a" * 7_000_000)
    assert large.value.status_code == 413
    with pytest.raises(openai.InternalServerError) as late:
        client.completions.create(model="demo", prompt="ten", **FOREVER)
    assert late.value.status_code == 504
    server.until(lambda: server.gauge("lmi_in_flight") == 0)


def test_a_stream_that_breaks_off_raises(server: Running, client: openai.OpenAI) -> None:
    parts = []
    with pytest.raises(openai.APIError, match="no whole answer within 6 s"):
        for chunk in client.completions.create(model="demo", prompt="ten", stream=True, **FOREVER):
            parts.append(chunk)
    assert len(parts) > 1
    server.until(lambda: server.gauge("lmi_in_flight") == 0)


def test_a_full_queue_is_tried_again(server: Running, client: openai.OpenAI) -> None:
    """The client does what Retry-After says, until the others' time is up."""
    many = [LONG["inputs"]] * 4
    headers = {"authorization": f"Bearer {KEY}"}
    body = LONG | {"inputs": many}
    with pytest.raises(openai.InternalServerError) as full:
        other = threading.Thread(
            target=lambda: server.client.post("/invocations", json=body, headers=headers)
        )
        other.start()
        server.until(lambda: server.gauge("lmi_in_flight") == 4)
        client.completions.create(model="demo", prompt="ten")
    assert full.value.status_code == 503
    assert full.value.response.headers["retry-after"] == "1"
    again = client.with_options(max_retries=30)
    found = again.completions.create(model="demo", prompt="ten", temperature=0)
    assert found.choices[0].text == "10"
    other.join(60)
    assert not other.is_alive()
