"""The handler for DJL Serving's Python engine, called as DJL does, by a local stand-in for it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lmi_multi
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.errors import OptionError
from lmi_multi.model import Model
from lmi_multi.serve import djl, djl_python
from tests.tiny_models import checkpoint

PROMPTS = ["twenty two dollars", "ten kilometers", "the third of march"]


class BatchInput(djl_python.Input):
    """Several requests that DJL batched."""

    def __init__(self, items: list[djl_python.Input]) -> None:
        super().__init__()
        self.items = items
        self.content.add("batch_000_data", b"...")

    def is_batch(self) -> bool:
        return True

    def get_batches(self) -> list[djl_python.Input]:
        return self.items


class BatchOutput(djl_python.Output):
    """Keeps what each request of a batch is answered."""

    def __init__(self, code: int = 200, message: str = "OK") -> None:
        super().__init__(code, message)
        self.answers: dict[int, Any] = {}

    def add_as_json(self, val: Any, key: Any = None, batch_index: int | None = None) -> Any:
        if batch_index is None:
            return super().add_as_json(val, key)
        assert batch_index not in self.answers
        self.answers[batch_index] = val
        return self


def item(value: Any = None, **properties: str) -> djl_python.Input:
    made = djl_python.Input()
    made.properties.update(properties)
    if value is not None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        made.content.add("data", data)
    return made


@pytest.fixture(scope="module")
def offline() -> Iterator[Model]:
    with lmi_multi.load("demo", backend="cpu") as model:
        yield model


@pytest.fixture(scope="module")
def handler() -> Iterator[ModuleType]:
    """The module as it is where DJL's package is there, after the call that loads the model."""
    stand_in = ModuleType("djl_python")
    stand_in.Input, stand_in.Output = BatchInput, BatchOutput  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "djl_python", stand_in)
        module = importlib.reload(djl)
        options = {"model_id": "demo", "backend": "cpu", "max_rolling_batch_size": "4"}
        own = {"model_dir": "/nothing", "device_id": "-1", "entryPoint": "lmi_multi.serve.djl"}
        assert module.handle(item(**options, **own)) is None
        yield module
    importlib.reload(djl)


def ask(handler: ModuleType, value: Any) -> Any:
    output = handler.handle(item(value))
    assert isinstance(output, BatchOutput)
    return output


def answer(handler: ModuleType, value: Any) -> Any:
    output = ask(handler, value)
    assert output.code == 200
    return json.loads(output.content.value_at(0))


def test_one_request(handler: ModuleType, offline: Model) -> None:
    expected = [{"generated_text": c.text} for c in offline.generate(PROMPTS, max_new_tokens=30)]
    assert answer(handler, {"inputs": PROMPTS[0]}) == expected[0]
    assert answer(handler, {"inputs": PROMPTS}) == expected
    parameters = {"details": True, "max_new_tokens": 3}
    found = answer(handler, {"inputs": PROMPTS[0], "parameters": parameters})
    assert found["details"]["finish_reason"] == "length"
    assert len(found["details"]["tokens"]) == found["details"]["generated_tokens"] == 3
    assert handler._handler._model.limits.max_batch == 4


def test_requests_of_a_batch_keep_their_parameters(handler: ModuleType, offline: Model) -> None:
    lengths = {"max_new_tokens": 2}
    several = {"do_sample": True, "seed": 1, "num_return_sequences": 2, "temperature": 2.0}
    batch = [
        item({"inputs": PROMPTS[0], "parameters": lengths}),
        item(b"{"),
        item({"inputs": PROMPTS, "parameters": several | {"max_new_tokens": 5}}),
        item({"inputs": "a", "parameters": {"top_p": 7}}),
        item({"inputs": PROMPTS[1], "stream": True}),
        item({"inputs": PROMPTS[1]}),
    ]
    answers = handler.handle(BatchInput(batch)).answers
    assert sorted(answers) == [0, 1, 2, 3, 4, 5]
    assert answers[0]["generated_text"] == offline.generate(PROMPTS[0], **lengths)[0].text
    assert answers[1]["code"] == 400 and "no JSON" in answers[1]["error"]
    drawn = offline.generate(PROMPTS, max_new_tokens=5, **several)
    assert [a["generated_text"] for a in answers[2]] == [c.text for c in drawn]
    assert answers[3]["code"] == 400 and "top_p is 7" in answers[3]["error"]
    assert "stream is True; allowed: without batch_size" in answers[4]["error"]
    assert answers[5]["generated_text"] == offline.generate(PROMPTS[1])[0].text


def test_a_stream(handler: ModuleType, offline: Model) -> None:
    output = ask(handler, {"inputs": PROMPTS[0], "stream": True})
    lines = [json.loads(part) for part in output.parts()]
    [expected] = offline.generate(PROMPTS[0], max_new_tokens=30, logprobs=0)
    assert [line["token"]["id"] for line in lines] == expected.token_ids
    assert "".join(line["token"]["text"] for line in lines) == expected.text
    assert lines[-1]["generated_text"] == expected.text
    assert lines[-1]["details"]["prompt_tokens"] == len(expected.prompt_token_ids)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"\xff", "the body is no UTF-8 at byte 0"),
        ({"input": "a"}, "unknown field 'input'; known: inputs"),
        ({"inputs": "a", "parameters": {"max_new_token": 1}}, "did you mean 'max_new_tokens'?"),
        ({"inputs": ["a", "b"], "stream": True}, "allowed: with one prompt and one answer"),
    ],
)
def test_refusals(value: Any, message: str, handler: ModuleType) -> None:
    output = ask(handler, value)
    body = json.loads(output.content.value_at(0))
    assert output.code == body["code"] == 400 and message in body["error"]


def test_an_encoder_answers_with_vectors(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(checkpoints, "bert", tokenizer=True)
    monkeypatch.setattr(djl, "_handler", None)
    assert djl.handle(item(model_dir=str(folder), backend="cpu", dtype="fp32")) is None
    output = djl.handle(item({"inputs": ["a", "bc"], "parameters": {"pooling": "cls"}}))
    with lmi_multi.load(folder, backend="cpu", dtype="fp32") as model:
        expected = model.embed(["a", "bc"], pooling="cls").tolist()
    assert output is not None and json.loads(output.content.value_at(0)) == expected


def test_partition(checkpoints: Path, tmp_path: Path) -> None:
    source = {"model_id": str(checkpoint(checkpoints, "llama")), "tensor_parallel_degree": "2"}
    djl.partition(item(**source, dtype="fp32", save_mp_checkpoint_path=str(tmp_path / "out")))
    artifact = Artifact.open(tmp_path / "out")
    assert (artifact.tensor_parallel, artifact.dtype) == (2, "fp32")
    with pytest.raises(OptionError, match="save_mp_checkpoint_path is None; allowed: a folder"):
        djl.partition(item(**source))
