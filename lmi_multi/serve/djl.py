"""This engine as a handler of DJL Serving's own Python engine, by `option.entryPoint` there.

Requests and answers are those of `/invocations`; the options are those of `serving.properties`.
Requests that DJL batches run in one batch here, each with its own parameters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmi_multi.checkpoint.convert import convert
from lmi_multi.checkpoint.publish import publish
from lmi_multi.checkpoint.s3.address import is_address
from lmi_multi.completion import Completion
from lmi_multi.errors import LmiError, OptionError
from lmi_multi.model import Model, load
from lmi_multi.options import GenerateOptions
from lmi_multi.prompts import Prompt, as_list
from lmi_multi.serve import body, lmi, names
from lmi_multi.serve.answer import Answer
from lmi_multi.serve.errors import HttpError
from lmi_multi.serve.lmi import Invocation
from lmi_multi.serve.settings import ServeSettings

if TYPE_CHECKING:
    from lmi_multi.serve.djl_python import Input, Output
else:
    try:
        from djl_python import Input, Output
    except ModuleNotFoundError:
        from lmi_multi.serve.djl_python import Input, Output

_TARGET = "save_mp_checkpoint_path"
_handler: Handler | None = None


def handle(inputs: Input) -> Output | None:
    """Answer a request, or several that came together. The one without content loads the model."""
    global _handler
    if _handler is None:
        settings = _settings(inputs.get_properties())
        _handler = Handler(load(**settings.load_arguments()), settings.enable_streaming)
    return None if inputs.is_empty() else _handler.answer(inputs)


def partition(inputs: Input) -> None:
    """Write the model as an artifact to `save_mp_checkpoint_path`, a folder or a place on S3, in
    `tensor_parallel_degree` files. Raises what `lmi_multi.convert` raises."""
    properties = inputs.get_properties()
    target = properties.get(_TARGET)
    if not target:
        raise OptionError(f"{_TARGET} is {target!r}; allowed: a folder, or s3://BUCKET/PREFIX")
    wanted = _settings(properties).load_arguments()
    kept = ("source", "dtype", "quantize", "tensor_parallel", "revision")
    write = publish if is_address(target) else convert
    write(target=target, **{name: wanted[name] for name in kept})


def _settings(properties: Mapping[str, str]) -> ServeSettings:
    """What the options among DJL's properties ask for; its own stand beside them."""
    named = {name.removeprefix("option."): name for o in names.OPTIONS for name in o.properties}
    known = {named[name]: value for name, value in properties.items() if name in named}
    fields: dict[str, Any] = {"model": properties.get("model_dir")}
    fields |= {field: entry.converted() for field, entry in names.of_file(known).items()}
    fields.pop("entry_point", None)  # which names this module
    return ServeSettings(**fields)


@dataclass(frozen=True)
class _Request:
    """One request, checked. `counts`: how many answers each of its prompts has."""

    asked: Invocation
    prompts: list[Prompt]
    options: list[GenerateOptions]
    counts: list[int]
    details: bool


class Handler:
    """A loaded model that answers what DJL Serving hands over."""

    def __init__(self, model: Model, streaming: bool = False) -> None:
        self._model, self._streaming = model, streaming

    def answer(self, inputs: Input) -> Output:
        """The answers to all of the requests; one that is wrong does not fail the others."""
        if inputs.is_batch():
            output = Output()
            for index, answer in enumerate(self._batch(inputs.get_batches())):
                output.add_as_json(answer, batch_index=index)
            return output
        try:
            return self._single(inputs)
        except (HttpError, LmiError) as error:
            failure = _failure(error)
            return Output().error(failure.message, code=failure.status)

    def _single(self, item: Input) -> Output:
        asked = _asked(item)
        if self._model.spec.kind == "encoder":
            return Output().add_as_json(self._vectors(asked))
        if self._streaming if asked.stream is None else asked.stream:
            return self._stream(self._read(asked))
        [answer] = self._generate([self._read(asked)])
        return Output().add_as_json(answer)

    def _batch(self, items: list[Input]) -> list[Any]:
        """An answer or an error for each. Streams are for those that come alone."""
        answers: list[Any] = [None] * len(items)
        requests: dict[int, _Request] = {}
        for index, item in enumerate(items):
            try:
                asked = _asked(item)
                if self._model.spec.kind == "encoder":
                    answers[index] = self._vectors(asked)
                elif asked.stream:
                    raise HttpError(400, "stream is True; allowed: without batch_size", "stream")
                else:
                    requests[index] = self._read(asked)
            except (HttpError, LmiError) as error:
                answers[index] = _failure(error).plain()
        for index, answer in zip(requests, self._generate([*requests.values()]), strict=True):
            answers[index] = answer
        return answers

    def _read(self, asked: Invocation) -> _Request:
        given, details = lmi.options(asked.parameters)
        if details or asked.stream or self._streaming:
            given.setdefault("logprobs", 0)
        prompts = as_list(asked.inputs)
        reader = self._model._reader
        options, counts = [], []
        for index, prompt in enumerate(prompts):
            ids = reader.ids(prompt, index)
            own = reader.bounded(GenerateOptions.of(given), ids, lmi.NEW_TOKENS)
            options.append(own)
            counts.append(len(reader.job(index, ids, own).answers))
        return _Request(asked, prompts, options, counts, details)

    def _generate(self, requests: list[_Request]) -> list[Any]:
        """What each request is answered; all of them run together."""
        found = iter(
            self._model.generate(
                [prompt for request in requests for prompt in request.prompts],
                [own for request in requests for own in request.options],
            )
        )
        return [
            self._shown(request, [next(found) for _ in range(sum(request.counts))])
            for request in requests
        ]

    def _shown(self, request: _Request, completions: list[Completion]) -> Any:
        for completion in completions:
            if completion.error is not None:
                return HttpError.of_answer(completion.finish_reason, completion.error).plain()
        shown = [
            lmi.shown(c, len(c.prompt_token_ids), self._model.tokenizer, request.details)
            for c in completions
        ]
        return shown[0] if request.asked.single and len(shown) == 1 else shown

    def _stream(self, request: _Request) -> Output:
        if sum(request.counts) != 1:
            raise HttpError(
                400, "stream is True; allowed: with one prompt and one answer", "stream"
            )
        prompt_tokens = len(self._model._reader.ids(request.prompts[0], 0))
        chunks = self._model.stream(request.prompts, request.options)

        def lines() -> Iterator[str]:
            answer = Answer()
            try:
                for chunk in chunks:
                    answer.add(chunk)
                    yield from map(json.dumps, lmi.events(chunk, answer, prompt_tokens))
            except (HttpError, LmiError) as error:
                yield json.dumps(_failure(error).plain())

        return Output().add_stream_content(lines(), output_formatter="{}\n".format)

    def _vectors(self, asked: Invocation) -> Any:
        vectors = self._model.embed(asked.inputs, **lmi.pooling(asked.parameters)).tolist()
        return vectors[0] if asked.single else vectors


def _asked(item: Input) -> Invocation:
    return body.check(Invocation, body.parse(bytes(item.get_as_bytes() or b"")))


def _failure(error: HttpError | LmiError) -> HttpError:
    return error if isinstance(error, HttpError) else HttpError.of(error)
