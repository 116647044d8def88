"""The handles that `init_inference` returns."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from lmi_multi.completion import Completion
from lmi_multi.errors import LmiError, OptionError
from lmi_multi.fastertransformer.parameters import (
    GPT_DEFAULTS,
    T5_DEFAULTS,
    complete,
    flag,
    options,
)
from lmi_multi.model import Model
from lmi_multi.prompts import Prompt, Prompts, as_list
from lmi_multi.streaming import Chunk
from lmi_multi.tokenizer import Tokenizer

_Self = TypeVar("_Self", bound="InferenceModel")
_TRITON = {"runtime_top_k": "top_k", "runtime_top_p": "top_p"}


class InferenceModel:
    """A loaded model under FasterTransformer's names. `model` is this package's own handle."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None where its folder has none."""
        return self.model.tokenizer

    def get_tokenizer(self) -> Tokenizer | None:
        """The same, as a call."""
        return self.model.tokenizer

    def close(self) -> None:
        """Free the model. Calling it twice is fine."""
        self.model.close()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _needs_tokenizer(self) -> Tokenizer:
        if self.model.tokenizer is None:
            raise OptionError("the model has no tokenizer, so its answers cannot become text")
        return self.model.tokenizer

    def _generate(self, prompts: list[Prompt], wanted: list[dict[str, Any]]) -> list[Completion]:
        """Completions in order, or an error for the first prompt whose answer failed."""
        completions = self.model.generate(prompts, wanted) if prompts else []
        for number, completion in enumerate(completions):
            if completion.error is not None:
                prompt = number * len(prompts) // len(completions)
                raise LmiError(f"prompt {prompt}: {completion.error}")
        return completions

    def _stream(
        self, prompts: list[Prompt], parameters: Mapping[str, Any], answers: int
    ) -> Iterator[list[str]]:
        """Text deltas of every answer, one list a step."""
        tokenizer = self._needs_tokenizer()
        wanted = options(parameters, len(prompts), tokenizer, answers)
        chunks = self.model.stream(prompts, wanted) if prompts else iter(())
        return _steps(chunks, len(prompts), answers)


class T5Model(InferenceModel):
    """An encoder-decoder."""

    def pipeline_generate(self, inputs: Prompts, **parameters: Any) -> Any:
        """Answer every prompt: list[str], the best answer of each.

        `parameters` are those of `parameters.T5_DEFAULTS`, single values or one for each prompt.
        With `is_return_output_log_probs` or `is_return_cum_log_probs` the result is a tuple: the
        texts, then log-probabilities of every generated token (list[list[float]]), then their
        sums (list[float]), each if it was asked for.

        Raises TypeError for an unknown parameter, OptionError for an invalid one.
        """
        tokenizer = self._needs_tokenizer()
        own = complete("pipeline_generate", T5_DEFAULTS, parameters)
        each, total = (
            flag(name, own[name])
            for name in ("is_return_output_log_probs", "is_return_cum_log_probs")
        )
        prompts = as_list(inputs)
        wanted = options(own, len(prompts), tokenizer, logprobs=each or total)
        completions = self._generate(prompts, wanted)
        texts = [completion.text or "" for completion in completions]
        if not each and not total:
            return texts
        tokens = [[t.logprob for t in c.logprobs or []] for c in completions]
        sums = [c.cumulative_logprob for c in completions]
        return (texts, *([tokens] if each else []), *([sums] if total else []))

    def stream_generate(
        self,
        inputs: Prompts,
        output_length: int | Sequence[int] | None = None,
        padding_side: str = "right",
        **parameters: Any,
    ) -> Iterator[list[str]]:
        """What each step adds to every prompt's answer: a list of text deltas a step.

        The deltas of a prompt, joined, are its answer. `output_length`, if given, is
        `max_seq_len`; there is no padding, so `padding_side` changes nothing. Everything is
        checked before this returns; closing the iterator frees the prompts' places.
        """
        given = _streaming(parameters, "max_seq_len", output_length, padding_side)
        own = complete("stream_generate", T5_DEFAULTS, given)
        _text_only(own, "is_return_output_log_probs", "is_return_cum_log_probs")
        return self._stream(as_list(inputs), own, 1)


class GPTModel(InferenceModel):
    """A decoder-only model."""

    def pipeline_generate(
        self,
        inputs: Prompts,
        batch_size: int = 1,
        output_len: int | Sequence[int] = 32,
        beam_width: int = 1,
        skip_end_tokens: bool = True,
        detokenize: bool = True,
        **parameters: Any,
    ) -> Any:
        """Continue every prompt: list[str] without the prompts, all beams of one after another.

        `batch_size` changes nothing: the engine fills its batches by itself. `skip_end_tokens`
        leaves end tokens out; without `detokenize` a text is the token ids with spaces between.
        `parameters` are those of `parameters.GPT_DEFAULTS`, single values or one for each prompt.
        With `return_output_length` or `return_cum_log_probs` the result is a tuple: the texts,
        then numbers of generated tokens (list[int]), then summed log-probabilities
        (list[float]), each if it was asked for.

        Raises TypeError for an unknown parameter, OptionError for an invalid one.
        """
        own = complete("pipeline_generate", GPT_DEFAULTS, parameters)
        own |= {"output_len": output_len, "beam_width": beam_width}
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise OptionError(f"batch_size is {batch_size!r:.80}, must be an integer, at least 1")
        skip, text = flag("skip_end_tokens", skip_end_tokens), flag("detokenize", detokenize)
        lengths = flag("return_output_length", own["return_output_length"])
        total = flag("return_cum_log_probs", own["return_cum_log_probs"])
        if text:
            self._needs_tokenizer()
        prompts = as_list(inputs)
        wanted = options(own, len(prompts), self.tokenizer, answers=beam_width or 1, logprobs=total)
        completions = self._generate(prompts, wanted)
        texts = [self._text(completion, skip, text) for completion in completions]
        if not lengths and not total:
            return texts
        counts = [len(c.token_ids) for c in completions]
        sums = [c.cumulative_logprob for c in completions]
        return (texts, *([counts] if lengths else []), *([sums] if total else []))

    def stream_generate(
        self,
        inputs: Prompts,
        output_length: int | Sequence[int] | None = None,
        padding_side: str = "right",
        **parameters: Any,
    ) -> Iterator[list[str]]:
        """What each step adds to every answer: a list of text deltas a step, prompts stripped.

        `parameters` are those of `pipeline_generate`, `output_len` and `beam_width` among them.
        For the others see `T5Model.stream_generate`.
        """
        given = _streaming(parameters, "output_len", output_length, padding_side)
        defaults = {**GPT_DEFAULTS, "output_len": 32, "beam_width": 1}
        own = complete("stream_generate", defaults, given)
        _text_only(own, "return_output_length", "return_cum_log_probs")
        return self._stream(as_list(inputs), own, own["beam_width"] or 1)

    def _text(self, completion: Completion, skip_end: bool, detokenize: bool) -> str:
        """Only end tokens are left out: the original shows other special tokens."""
        ends = self.model.defaults.eos_token_ids if skip_end else ()
        ids = [token for token in completion.token_ids if token not in ends]
        if not detokenize:
            return " ".join(map(str, ids))
        if completion.finish_reason == "stop":
            return completion.text or ""  # cut before the stop word
        return self._needs_tokenizer().decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def _streaming(
    parameters: Mapping[str, Any], name: str, length: Any, padding_side: str
) -> dict[str, Any]:
    """The parameters of a stream under the names of `pipeline_generate`."""
    if padding_side not in ("left", "right"):
        raise OptionError(f"padding_side is {padding_side!r:.80}, must be left or right")
    own = {_TRITON.get(given, given): value for given, value in parameters.items()}
    if len(own) < len(parameters) or (length is not None and name in own):
        raise TypeError("stream_generate() got one parameter under two names")
    return own if length is None else own | {name: length}


def _text_only(parameters: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if flag(name, parameters[name]):
            raise OptionError(f"{name} is set, but a stream yields texts only")


def _steps(chunks: Iterator[Chunk], prompts: int, answers: int) -> Iterator[list[str]]:
    """Chunks of one step as one list. Within a step their places rise: one that does not, or is
    there already, begins the next."""

    def step() -> Generator[list[str]]:
        texts, last = [""] * (prompts * answers), -1
        try:
            for chunk in chunks:
                place = chunk.index * answers + chunk.answer
                if place <= last:
                    yield texts
                    texts = [""] * (prompts * answers)
                if chunk.error is not None:
                    raise LmiError(f"prompt {chunk.index}: {chunk.error}")
                texts[place], last = chunk.text or "", place
            if last >= 0:
                yield texts
        finally:
            close = getattr(chunks, "close", None)
            if close is not None:
                close()

    return step()
