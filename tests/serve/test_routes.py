"""The routes as a black box on a real port, each answer beside the offline one."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

import lmi_multi
from lmi_multi.errors import OptionError
from lmi_multi.model import Model
from lmi_multi.serve.errors import HttpError
from lmi_multi.serve.openai import _CALLED, _in_their_words
from tests.serve.running import Running, serving
from tests.tiny_models import checkpoint

PROMPTS = ["twenty two dollars", "the third of march nineteen ninety nine", "ten kilometers"]


@pytest.fixture(scope="module")
def offline() -> Iterator[Model]:
    with lmi_multi.load("demo", backend="cpu") as model:
        yield model


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("demo"), "demo", "--max-batch", "8") as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="module")
def chatter(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Path
) -> Iterator[tuple[Running, Path]]:
    """A decoder with a byte tokenizer and a chat template."""
    folder = checkpoint(checkpoints, "llama", tokenizer=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": template})
    )
    place = tmp_path_factory.mktemp("chat")
    with serving(place, str(folder), "--dtype", "fp32", "--name", "chatter") as running:
        running.wait_ready()
        yield running, folder


def client(server: Running, **keywords: Any) -> openai.OpenAI:
    address = f"{server.client.base_url}/v1"
    return openai.OpenAI(base_url=address, api_key="none", max_retries=0, **keywords)


# --- SageMaker and DJL


def test_one_prompt_and_many(server: Running, offline: Model) -> None:
    expected = [c.text for c in offline.generate(PROMPTS, max_new_tokens=30)]
    assert server.post("/invocations", {"inputs": PROMPTS[0]}).json() == {
        "generated_text": expected[0]
    }
    many = server.post("/invocations", {"inputs": PROMPTS}).json()
    assert [one["generated_text"] for one in many] == expected
    text = server.client.post(
        "/invocations", content=PROMPTS[0], headers={"content-type": "text/plain"}
    )
    assert text.json() == {"generated_text": expected[0]}


def test_details(server: Running, offline: Model) -> None:
    parameters = {"details": True, "max_new_tokens": 3, "stop_sequences": ["x"]}
    answer = server.post("/invocations", {"inputs": PROMPTS[0], "parameters": parameters}).json()
    [expected] = offline.generate(PROMPTS[:1], max_new_tokens=3, logprobs=0)
    details = answer["details"]
    assert answer["generated_text"] == expected.text
    assert (details["finish_reason"], details["generated_tokens"]) == ("length", 3)
    assert details["prompt_tokens"] == len(expected.prompt_token_ids)
    assert [t["id"] for t in details["tokens"]] == expected.token_ids
    assert expected.logprobs is not None
    ours = [t["log_prob"] for t in details["tokens"]]
    assert ours == pytest.approx([e.logprob for e in expected.logprobs], abs=1e-3)


def test_sampling_and_beams(server: Running, offline: Model) -> None:
    parameters = {"temperature": 5.0, "top_k": 30, "seed": 7, "max_new_tokens": 12}
    answer = server.post("/invocations", {"inputs": PROMPTS[0], "parameters": parameters}).json()
    [expected] = offline.generate(PROMPTS[:1], parameters, do_sample=True)
    assert answer["generated_text"] == expected.text
    beams = {"num_beams": 3, "num_return_sequences": 2}
    answers = server.post("/invocations", {"inputs": PROMPTS[0], "parameters": beams}).json()
    found = offline.generate(PROMPTS[:1], beams, max_new_tokens=30)
    assert [a["generated_text"] for a in answers] == [c.text for c in found]
    assert answers[0]["score"] >= answers[1]["score"]


@pytest.mark.parametrize("sse", [False, True])
def test_streams(server: Running, offline: Model, sse: bool) -> None:
    headers = {"accept": "text/event-stream"} if sse else {}
    [expected] = offline.generate(PROMPTS[:1], max_new_tokens=30)
    body = {"inputs": PROMPTS[0], "stream": True}
    with server.client.stream("POST", "/invocations", json=body, headers=headers) as answer:
        kind = answer.headers["content-type"].partition(";")[0]
        assert kind == ("text/event-stream" if sse else "application/jsonlines")
        lines = [line for line in answer.iter_lines() if line]
    events = [json.loads(line.removeprefix("data: " if sse else "")) for line in lines]
    assert "".join(e["token"]["text"] for e in events) == expected.text
    assert [e["token"]["id"] for e in events] == expected.token_ids
    assert all(isinstance(e["token"]["log_prob"], float) for e in events)
    assert all("generated_text" not in e for e in events[:-1])
    assert events[-1]["generated_text"] == expected.text
    assert events[-1]["details"]["finish_reason"] == "eos_token"


def test_lines_of_batch_transform(server: Running, offline: Model) -> None:
    lines = "\n".join(json.dumps({"inputs": prompt}) for prompt in PROMPTS)
    answer = server.client.post(
        "/invocations", content=lines, headers={"content-type": "application/jsonlines"}
    )
    found = [json.loads(line)["generated_text"] for line in answer.text.splitlines()]
    assert found == [c.text for c in offline.generate(PROMPTS, max_new_tokens=30)]
    shown = server.client.get("/execution-parameters").json()
    assert set(shown) == {"MaxConcurrentTransforms", "BatchStrategy", "MaxPayloadInMB"}


def test_lines_run_beside_each_other(server: Running, offline: Model) -> None:
    """Each with parameters of its own; four of 40 tokens take hardly more steps than one."""
    lengths = {"min_new_tokens": 40, "max_new_tokens": 40, "ignore_eos": True}
    bodies: list[dict[str, Any]] = [
        {"inputs": PROMPTS[0], "parameters": lengths},
        {"inputs": PROMPTS[:2], "parameters": lengths},
        {"inputs": PROMPTS[1], "parameters": {"max_new_tokens": 3, "details": True}},
    ]
    before = server.gauge("lmi_engine_steps")
    headers = {"content-type": "application/jsonlines"}
    content = "\n".join(map(json.dumps, bodies))
    with ThreadPoolExecutor(1) as pool:
        with server.standing():  # until all of them are there
            lines = pool.submit(
                server.client.post, "/invocations", content=content, headers=headers
            )
            server.until(lambda: server.gauge("lmi_in_flight") == 4)
        answer = lines.result()
    assert server.gauge("lmi_engine_steps") - before < 60
    first, both, short = map(json.loads, answer.text.splitlines())
    expected = [c.text for c in offline.generate(PROMPTS[:2], lengths)]
    assert [entry["generated_text"] for entry in both] == expected
    assert first["generated_text"] == expected[0]
    assert short["details"]["generated_tokens"] == 3
    stream = json.dumps({"inputs": "ten", "stream": True})
    answer = server.client.post("/invocations", content=stream, headers=headers)
    assert answer.status_code == 400 and "line 1: stream is True" in answer.text
    wrong = {"inputs": "ten", "parameters": {"max_new_tokens": -1}}
    content = "\n".join(map(json.dumps, (bodies[0], wrong)))
    answer = server.client.post("/invocations", content=content, headers=headers)
    assert answer.status_code == 400 and "line 2: max_new_tokens is -1" in answer.text


def test_many_clients_get_their_own_answers(server: Running, offline: Model) -> None:
    numbers = [f"{n} dollars" for n in ("one", "two", "three", "four", "five", "six")] * 8
    expected = {p: c.text for p, c in zip(numbers, offline.generate(numbers), strict=True)}

    def ask(prompt: str) -> tuple[str, str]:
        answer = server.post("/invocations", {"inputs": prompt})
        assert answer.status_code == 200
        return prompt, answer.json()["generated_text"]

    with ThreadPoolExecutor(16) as pool:
        for prompt, text in pool.map(ask, numbers):
            assert text == expected[prompt]
    assert server.gauge("lmi_in_flight") == 0


# --- OpenAI


def test_completions(server: Running, offline: Model) -> None:
    with client(server) as own:
        found = own.completions.create(model="demo", prompt=PROMPTS, temperature=0, max_tokens=30)
        expected = offline.generate(PROMPTS, max_new_tokens=30)
        assert [c.text for c in found.choices] == [c.text for c in expected]
        assert [c.finish_reason for c in found.choices] == ["stop"] * 3
        assert found.usage is not None
        assert found.usage.completion_tokens == sum(len(c.token_ids) for c in expected)
        assert found.usage.prompt_tokens == sum(len(c.prompt_token_ids) for c in expected)
        text = [""] * 3
        usage = None
        for chunk in own.completions.create(
            model="demo",
            prompt=PROMPTS,
            temperature=0,
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
        ):
            for choice in chunk.choices:
                text[choice.index] += choice.text
            usage = chunk.usage or usage
        assert text == [c.text for c in expected] and usage == found.usage


def test_openai_options(server: Running, offline: Model) -> None:
    with client(server) as own:
        found = own.completions.create(
            model="demo", prompt=PROMPTS[0], n=3, seed=5, temperature=2.0, max_tokens=9, logprobs=2
        )
        expected = offline.generate(
            PROMPTS[0],
            do_sample=True,
            num_return_sequences=3,
            seed=5,
            temperature=2.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=9,
        )
        assert [c.text for c in found.choices] == [c.text for c in expected]
        first = found.choices[0].logprobs
        assert first is not None and first.token_logprobs is not None
        assert len(first.token_logprobs) == len(expected[0].token_ids)
        beams = own.completions.create(
            model="demo", prompt=PROMPTS[0], extra_body={"num_beams": 3}, max_tokens=30
        )
        assert beams.choices[0].text == offline.generate(PROMPTS[0], num_beams=3)[0].text
        assert [model.id for model in own.models.list()] == ["demo"]


def test_chat(chatter: tuple[Running, Path]) -> None:
    server, folder = chatter
    messages: Any = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    with lmi_multi.load(folder, backend="cpu", dtype="fp32") as model, client(server) as own:
        expected = model.chat(messages, max_new_tokens=12)
        keywords: Any = {"model": "chatter", "messages": messages, "temperature": 0}
        found = own.chat.completions.create(
            **keywords, max_completion_tokens=12, logprobs=True, top_logprobs=2
        )
        assert found.choices[0].message.content == expected.text
        content = found.choices[0].logprobs and found.choices[0].logprobs.content
        assert content is not None and len(content) == len(expected.token_ids)
        assert all(len(entry.top_logprobs) == 2 for entry in content)
        streamed = own.chat.completions.create(**keywords, max_tokens=12, stream=True)
        deltas = [chunk.choices[0].delta for chunk in streamed]
        assert deltas[0].role == "assistant"
        assert "".join(delta.content or "" for delta in deltas) == expected.text
        echoed = own.completions.create(model="", prompt="abc", echo=True, max_tokens=3)
        assert echoed.choices[0].text.startswith("abc")
        vectors = own.embeddings.create(model="chatter", input=["abc", "d"])
        assert np.allclose(
            [v.embedding for v in vectors.data], model.embed(["abc", "d"]), atol=1e-5
        )


def test_embeddings_of_an_encoder(tmp_path: Path, checkpoints: Path) -> None:
    folder = checkpoint(checkpoints, "bert")
    ids = [[5, 6, 7], [8]]
    with (
        lmi_multi.load(folder, backend="cpu", dtype="fp32") as model,
        serving(tmp_path, str(folder), "--dtype", "fp32") as server,
    ):
        server.wait_ready()
        parameters = {"pooling": "cls", "normalize": False}
        found = server.post("/invocations", {"inputs": ids, "parameters": parameters}).json()
        assert np.allclose(found, model.embed(ids, "cls", False), atol=1e-5)
        body = {"input": ids, "encoding_format": "base64"}
        data = server.post("/v1/embeddings", body).json()["data"]
        vectors = [np.frombuffer(base64.b64decode(d["embedding"]), "<f4") for d in data]
        assert np.allclose(vectors, model.embed(ids), atol=1e-5)
        refused = server.post("/v1/completions", {"prompt": ids})
        assert refused.status_code == 400 and "generates no text" in refused.text


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("completions", "n", 50),
        ("completions", "max_tokens", 0),
        ("completions", "top_k", -1),
        ("completions", "logit_bias", {"1000000000": 1}),
        ("chat/completions", "max_tokens", 0),
        ("chat/completions", "max_completion_tokens", 0),
        ("chat/completions", "top_logprobs", 21),
    ],
)
def test_openai_s_errors_name_the_client_s_field(
    chatter: tuple[Running, Path], path: str, field: str, value: Any
) -> None:
    server, _ = chatter
    body: dict[str, Any] = {"prompt": "a"}
    if path != "completions":
        body = {"messages": [{"role": "user", "content": "a"}]}
    if field == "top_logprobs":
        body["logprobs"] = True
    answer = server.post(f"/v1/{path}", body | {field: value})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == field
    assert error["message"].removeprefix("prompt 0: ").startswith(f"{field} ")


def test_echo_of_an_encoder_decoder_is_named() -> None:
    with pytest.raises(HttpError) as raised, _in_their_words(_CALLED):
        raise OptionError("return_full_text is True; allowed: False", "return_full_text")
    assert (raised.value.message, raised.value.param) == ("echo is True; allowed: False", "echo")


def test_one_model_by_its_name(server: Running) -> None:
    found = server.client.get("/v1/models/demo")
    assert found.status_code == 200
    assert found.json() == server.client.get("/v1/models").json()["data"][0]
    other = server.client.get("/v1/models/gpt/4")
    assert other.status_code == 404 and other.json()["error"]["param"] == "model"
    assert other.json()["error"]["message"] == "model is 'gpt/4'; allowed: 'demo'"


# --- OpenAPI


def test_the_routes_are_described(server: Running) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {"/ping", "/invocations", "/execution-parameters", "/metrics"} <= set(paths)
    assert {"/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/models"} <= set(paths)
    body = paths["/invocations"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["anyOf"][0]["properties"]) == {"inputs", "parameters", "stream"}
