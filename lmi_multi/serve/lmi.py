"""Requests and answers in the shapes of DJL Serving's LMI containers: for the server's routes, and
for the handler that DJL Serving itself calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pydantic import Field, StrictBool

from lmi_multi.completion import TokenLogprob
from lmi_multi.embedding import Pooling
from lmi_multi.options import GenerateOptions
from lmi_multi.serve import body
from lmi_multi.serve.body import Body, Prompts
from lmi_multi.serve.errors import HttpError
from lmi_multi.streaming import Chunk
from lmi_multi.tokenizer import Tokenizer, text_of

NEW_TOKENS = 30  # LMI's default
_REASONS = {"eos": "eos_token", "length": "length", "stop": "stop_sequence"}
_NAMES = {"stop_sequences": "stop"}


class Invocation(Body):
    """The body of `/invocations`: prompts, and how to continue them."""

    inputs: Prompts
    parameters: dict[str, Any] = Field(default_factory=dict)
    stream: StrictBool | None = None

    @property
    def single(self) -> bool:
        """Whether there is one prompt that is no list: its answer is none either."""
        return isinstance(self.inputs, str) or is_ids(self.inputs)


class Answered(Protocol):
    """A whole answer: an `Answer`, or a `Completion`."""

    @property
    def text(self) -> str | None: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def finish_reason(self) -> str: ...
    @property
    def logprobs(self) -> Sequence[TokenLogprob] | None: ...
    @property
    def score(self) -> float | None: ...


def options(parameters: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Our options, and whether details are wanted."""
    given = {_NAMES.get(name, name): value for name, value in parameters.items()}
    if len(given) < len(parameters):
        raise HttpError(400, "stop and stop_sequences are the same; allowed: one of them", "stop")
    details = given.pop("details", False)
    if not isinstance(details, bool):
        raise HttpError(400, f"details is {details!r:.80}; allowed: true or false", "details")
    # Sampling options beside an unset do_sample mean sampling there.
    asked = GenerateOptions.of({n: v for n, v in given.items() if n != "do_sample"})
    if given.get("do_sample") is None and asked.sampling_asked() and not asked.num_beams:
        given["do_sample"] = True
    return given, details


class _Pooling(Body):
    """The parameters of an embedding."""

    pooling: Pooling = "mean"
    normalize: StrictBool = True


def pooling(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """How tokens become one vector. Raises HttpError 400 for anything else among `parameters`."""
    return body.check(_Pooling, parameters).model_dump()


def shown(
    answer: Answered, prompt_tokens: int, tokenizer: Tokenizer | None, with_details: bool
) -> dict[str, Any]:
    """A whole answer."""
    result: dict[str, Any] = {"generated_text": answer.text or ""}
    if answer.score is not None:
        result["score"] = answer.score
    if tokenizer is None:
        result["token_ids"] = answer.token_ids
    if with_details:
        tokens = [_token(tokenizer, entry) for entry in answer.logprobs or ()]
        result["details"] = details(answer, prompt_tokens) | {"tokens": tokens}
    return result


def details(answer: Answered, prompt_tokens: int) -> dict[str, Any]:
    """Why it ended, and how many tokens it took."""
    return {
        "finish_reason": _REASONS.get(answer.finish_reason, answer.finish_reason),
        "generated_tokens": len(answer.token_ids),
        "prompt_tokens": prompt_tokens,
    }


def _token(tokenizer: Tokenizer | None, entry: TokenLogprob) -> dict[str, Any]:
    text = None if tokenizer is None else text_of(tokenizer, [entry.token_id], False)
    return {"id": entry.token_id, "text": text, "log_prob": entry.logprob}


def events(chunk: Chunk, answer: Answered, prompt_tokens: int) -> list[dict[str, Any]]:
    """What a stream says of a chunk, the last one of `answer`: a line for each token; the last one
    has the whole text and details beside it."""
    lines = _tokens(chunk)
    if chunk.finish_reason is not None:
        lines = lines or [{}]
        lines[-1] |= {"generated_text": answer.text, "details": details(answer, prompt_tokens)}
    return lines


def _tokens(chunk: Chunk) -> list[dict[str, Any]]:
    """A chunk's tokens; its text, which may be several tokens', stands with the last one."""
    scores = [entry.logprob for entry in chunk.logprobs or []]
    texts = [""] * (len(chunk.token_ids) - 1) + [chunk.text or ""]
    return [
        {"token": {"id": token, "text": text, "log_prob": score}}
        for token, text, score in zip(chunk.token_ids, texts, scores, strict=True)
    ]


def is_ids(inputs: Any) -> bool:
    """Whether a prompt is given as token ids."""
    return bool(inputs) and all(isinstance(entry, int) for entry in inputs)
