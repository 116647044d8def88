"""What callers may pass as prompts: made uniform, tokenized, checked, and turned into sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmi_multi.backends.base import Limits
from lmi_multi.defaults import GenerationDefaults
from lmi_multi.engine import sequence as engine
from lmi_multi.engine.batch import Passage
from lmi_multi.engine.beams import BeamSearch
from lmi_multi.engine.detokenizer import Detokenizer
from lmi_multi.engine.request import Job
from lmi_multi.errors import OptionError
from lmi_multi.models.spec import ModelSpec
from lmi_multi.models.traits import Traits
from lmi_multi.options import GenerateOptions
from lmi_multi.resolved import Resolved
from lmi_multi.tokenizer import Tokenizer

Prompt = str | list[int]
Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Sequence[Prompt]

_BYTES = (bytes, bytearray, memoryview)  # sequences of integers, but not of token ids


def as_list(prompts: Prompts) -> list[Prompt]:
    """One string or one sequence of token ids becomes a list of one; other sequences lists.

    Arrays and tensors of ids are taken too, whole or as entries. Raises OptionError that names
    the offending entry.
    """
    if isinstance(prompts, str):
        return [prompts]
    entries = _entries(prompts, "prompts")
    ids = _ids(entries)
    if ids:
        return [ids]
    return [_prompt(_plain(entry), index) for index, entry in enumerate(entries)]


def _prompt(entry: Any, index: int) -> Prompt:
    if isinstance(entry, str):
        return entry
    items = _entries(entry, f"prompt {index}")
    ids = _ids(items)
    if ids is None:
        wrong = next(item for item in map(_plain, items) if not _is_id(item))
        raise OptionError(f"prompt {index} holds {wrong!r}, must hold integer token ids only")
    return ids


def _entries(value: Any, what: str) -> Sequence[Any]:
    plain = _plain(value)
    if not isinstance(plain, Sequence) or isinstance(plain, _BYTES):
        raise OptionError(
            f"{what} is a {type(value).__name__}, must be a string or a list of token ids"
        )
    return plain


def _ids(entries: Sequence[Any]) -> list[int] | None:
    """The entries as token ids; None if one of them is none."""
    if set(map(type, entries)) <= {int}:  # most often; nothing else is as fast to find out
        return list(entries)
    items = list(map(_plain, entries))
    return list(map(int, items)) if all(map(_is_id, items)) else None


def _plain(value: Any) -> Any:
    """Arrays, tensors and their scalars as lists and numbers of Python."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, _BYTES) else value


def _is_id(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def check_text(text: str, what: str) -> None:
    """Raise OptionError for half a surrogate pair, of which no tokenizer can make anything."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OptionError(f"{what} is no valid Unicode at character {error.start}") from None


@dataclass(frozen=True)
class PromptReader:
    """Turns prompts into token ids, and into sequences for the engine, of one model."""

    spec: ModelSpec | Traits
    limits: Limits
    tokenizer: Tokenizer | None
    defaults: GenerationDefaults

    def read(self, prompts: Prompts) -> tuple[list[Prompt], list[list[int]]]:
        """The prompts as given, one an entry, and the token ids of each."""
        given = as_list(prompts)
        return given, [self.ids(prompt, index) for index, prompt in enumerate(given)]

    def ids(self, prompt: Prompt, index: int) -> list[int]:
        """A prompt's token ids, checked; an empty one becomes the start-of-text token.

        Raises OptionError, naming the prompt by `index`, for text without a tokenizer, ids
        outside the vocabulary, nothing at all, and more tokens than `limits.max_tokens`.
        """
        ids = self.encode(prompt, index) if isinstance(prompt, str) else prompt
        bos = self.defaults.bos_token_id
        if not ids and self.spec.kind == "decoder" and bos is not None:
            ids = [bos]
        if not ids:
            raise OptionError(f"prompt {index} is empty")
        self.check(ids, f"prompt {index}")
        return ids

    def encode(self, text: str, index: int) -> list[int]:
        """Token ids of `text`. Raises OptionError where the model has no tokenizer."""
        if self.tokenizer is None:
            raise OptionError(
                f"prompt {index} is text, but the model has no tokenizer: pass token ids"
            )
        check_text(text, f"prompt {index}")
        return self.tokenizer.encode(text)

    def check(self, ids: Sequence[int], what: str) -> None:
        """Raise OptionError for ids outside the vocabulary, or more of them than fit."""
        vocab = self.spec.vocab
        if ids and not (min(ids) >= 0 and max(ids) < vocab):
            token = next(token for token in ids if not 0 <= token < vocab)
            raise OptionError(f"{what} holds token id {token}, must be 0 to {vocab - 1}")
        if len(ids) > self.limits.max_tokens:
            raise OptionError(
                f"{what} has {len(ids)} tokens, must be at most {self.limits.max_tokens}"
            )

    def start_token(self) -> int:
        """The token that an encoder-decoder's answers begin with."""
        start = self.defaults.decoder_start_token_id
        if start is None:
            raise OptionError(
                f"{self.defaults.source} has no decoder_start_token_id, which the answers of an "
                "encoder-decoder start with"
            )
        return start

    def jobs(
        self,
        prompts: Sequence[list[int]],
        options: Sequence[GenerateOptions],
        streaming: bool = False,
    ) -> list[Job]:
        """`job` of each prompt, with its own one of `options`: mostly the same object."""
        jobs: list[Job] = []
        resolved: dict[int, Resolved] = {}  # by the options' identity
        for index, (ids, own) in enumerate(zip(prompts, options, strict=True)):
            jobs.append(self.job(index, ids, own, streaming, resolved.get(id(own))))
            resolved[id(own)] = jobs[-1].answers[0].options
        return jobs

    def job(
        self,
        index: int,
        ids: list[int],
        options: GenerateOptions,
        streaming: bool = False,
        like: Resolved | None = None,
    ) -> Job:
        """What the engine runs for one prompt: a sequence for each answer that is asked for, or a
        beam search for all of them.

        With `streaming` the answers' texts grow with their tokens. `like`: what these options
        have become for another prompt.
        """
        decoder_only = self.spec.kind == "decoder"
        try:
            resolved = self.defaults.resolve(
                options,
                prompt_tokens=len(ids),
                decoder_only=decoder_only,
                limit=self.limits.max_tokens,
                vocab=self.spec.vocab,
                tokenizer=self.tokenizer,
                like=like,
            )
        except OptionError as error:
            raise OptionError(f"prompt {index}: {error}", error.option) from None
        if resolved.stop and self.tokenizer is None:
            raise OptionError("stop needs a tokenizer, and the model has none", "stop")
        grows = self.tokenizer if resolved.stop or streaming else None
        answers = [
            engine.Sequence(
                options=resolved,
                tokens=list(ids) if decoder_only else [self.start_token()],
                encoder_ids=None if decoder_only else ids,
                detokenizer=None if grows is None else Detokenizer(grows, resolved.stop),
                stream=stream,
            )
            for stream in range(resolved.num_return_sequences)
        ]
        if resolved.num_beams == 1:
            return Job(answers, answers)
        where = "" if options.num_beams else f" in {self.defaults.source}"
        return Job([self._search(index, answers, f"num_beams{where}")], answers)

    def bounded(self, options: GenerateOptions, ids: list[int], length: int) -> GenerateOptions:
        """`options` with at most `length` new tokens, and no more than fit, where neither they nor
        the model's own file set a length."""
        filed = self.defaults.options
        lengths = (options.max_new_tokens, options.max_length)
        if any(value is not None for value in (*lengths, filed.max_new_tokens, filed.max_length)):
            return options
        used = len(ids) if self.spec.kind == "decoder" else 1
        room = max(1, min(length, self.limits.max_tokens - used))
        return GenerateOptions.of(options, max_new_tokens=room)

    def _search(self, index: int, answers: Sequence[engine.Sequence], name: str) -> BeamSearch:
        """The beam search that finds `answers`, checked for what the model was loaded for; `name`
        says where its number of beams stands."""
        first = answers[0]
        options = first.options
        stops = self.tokenizer if options.stop else None
        search = BeamSearch(
            options,
            first.tokens,
            answers,
            self.limits.block_size,
            first.encoder_ids,
            None if stops is None else Detokenizer(stops, options.stop),
        )
        limits = self.limits
        if not limits.beams:
            raise OptionError(
                f"prompt {index}: num_beams is {options.num_beams}; allowed: 1, as what the model "
                "was loaded with has no beam search",
                "num_beams",
            )
        if options.num_beams > limits.max_batch:
            raise OptionError(
                f"prompt {index}: {name} is {options.num_beams}; allowed: at most "
                f"{limits.max_batch}, the max_batch that the model was loaded with",
                "num_beams",
            )
        needed = sum(search.blocks_needed(limits.block_size))
        if needed > limits.blocks:
            raise OptionError(
                f"prompt {index}: {name} is {options.num_beams}, which with up to "
                f"{options.max_new_tokens} new tokens needs {needed} cache blocks of "
                f"{limits.block_size} tokens; allowed: at most {limits.blocks}, so fewer beams or "
                "new tokens",
                "num_beams",
            )
        return search

    def continuations(self, continuations: Prompts) -> list[list[int]]:
        """Token ids to score: of strings without special tokens. None may be empty."""
        results = []
        for index, entry in enumerate(as_list(continuations)):
            what = f"continuation {index}"
            if isinstance(entry, str):
                if self.tokenizer is None:
                    raise OptionError(f"{what} is text, but the model has no tokenizer")
                check_text(entry, what)
                entry = self.tokenizer.encode(entry, add_special_tokens=False)
            if not entry:
                raise OptionError(f"{what} is empty")
            self.check(entry, what)
            results.append(entry)
        return results

    def passage(self, index: int, ids: list[int], answer: list[int]) -> Passage:
        """Prompt `index` with a known answer, as the network reads them."""
        if self.spec.kind == "decoder":
            self.check([*ids, *answer], f"prompt {index} with its continuation")
            return Passage([*ids, *answer])
        return Passage([self.start_token(), *answer], ids)

    def segments(
        self, ids: list[list[int]], segment_ids: Sequence[Sequence[int]] | None
    ) -> list[Sequence[int] | None]:
        """Checked segment ids of each prompt. Raises OptionError where they do not fit."""
        if segment_ids is None:
            return [None] * len(ids)
        if not self.spec.segments:
            raise OptionError(f"segment_ids given, but {self.spec.family} has no segments")
        if len(segment_ids) != len(ids):
            raise OptionError(f"{len(segment_ids)} segment_ids for {len(ids)} prompts")
        for index, (own, tokens) in enumerate(zip(segment_ids, ids, strict=True)):
            if len(own) != len(tokens):
                raise OptionError(
                    f"segment_ids {index} has {len(own)} entries for {len(tokens)} tokens"
                )
            if any(not 0 <= s < self.spec.segments for s in own):
                raise OptionError(f"segment_ids {index} must be 0 to {self.spec.segments - 1}")
        return list(segment_ids)
