"""How long an engine takes for a first token, and for each after it."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType
from typing import Any

from lmi_multi.defaults import GenerationDefaults
from lmi_multi.engine.beams import BeamSearch
from lmi_multi.engine.engine import Engine
from lmi_multi.engine.request import Request
from lmi_multi.engine.sequence import Sequence
from lmi_multi.errors import OptionError
from lmi_multi.models.spec import ModelSpec
from lmi_multi.models.traits import Traits
from lmi_multi.options import GenerateOptions
from lmi_multi.resolved import Resolved

# Options that this has to say itself, how long answers are and of how many rows, and those that ask
# for more than answers.
REFUSED = frozenset(
    {"max_new_tokens", "max_length", "min_new_tokens", "min_length", "stop", "stop_token_ids"}
    | {"num_beams", "num_beam_groups", "length_penalty", "early_stopping", "diversity_penalty"}
    | {"num_return_sequences", "prompt_logprobs", "return_full_text"}
)


@dataclass(frozen=True)
class Timing:
    """Medians of several rounds, milliseconds: `first` of an answer of one token, `whole` of one
    of all tokens, and from these `step`, of each token after the first."""

    rows: int
    first: float
    whole: float
    step: float

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together, once the first token is there."""
        return self.rows / self.step * 1000


def check_options(options: Mapping[str, Any]) -> None:
    """Raise OptionError for those that are none, and for those that do not choose among tokens."""
    if wrong := REFUSED & options.keys():
        raise OptionError(f"{min(wrong)} is given; allowed: options that choose among tokens")
    GenerateOptions(**options)


def time_generation(
    engine: Engine,
    spec: ModelSpec | Traits,
    rows: int,
    prompt: int,
    tokens: int,
    rounds: int,
    beams: int = 1,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Timing:
    """Answer random prompts of `prompt` tokens with exactly `tokens` > 1 tokens, in steps of `rows`
    rows: of a prompt each, or of `beams` beams of a prompt; by `options`, else greedily.

    Raises OptionError as `check_options`, and for options by which an answer ends early.
    """
    check_options(options)
    chance = random.Random(rows)
    prompts = [
        [chance.randrange(2, spec.vocab) for _ in range(prompt)] for _ in range(rows // beams)
    ]

    def answer(count: int) -> float:
        chosen = GenerateOptions(**options, max_new_tokens=count, num_beams=beams)
        return _run(engine, spec, prompts, chosen)

    for count in (1, tokens):
        answer(count)  # whatever is made on first use
    first = median(answer(1) for _ in range(rounds))
    whole = median(answer(tokens) for _ in range(rounds))
    return Timing(rows, first, whole, (whole - first) / (tokens - 1))


def _run(
    engine: Engine, spec: ModelSpec | Traits, prompts: list[list[int]], chosen: GenerateOptions
) -> float:
    decoder_only = spec.kind == "decoder"
    limits = engine.executor.limits
    defaults = GenerationDefaults(decoder_start_token_id=0)
    options = defaults.resolve(
        chosen,
        prompt_tokens=len(prompts[0]),
        decoder_only=decoder_only,
        limit=limits.max_tokens,
        vocab=spec.vocab,
    )
    requests = [
        _request(options, list(own), None, limits.block_size)
        if decoder_only
        else _request(options, [0], list(own), limits.block_size)
        for own in prompts
    ]
    start = time.perf_counter()
    engine.run(requests)
    taken = (time.perf_counter() - start) * 1000
    if ended := {request.finish_reason for request in requests} - {"length"}:
        raise OptionError(f"answers end early ({ended.pop()}), by {options}: nothing to time")
    return taken


def _request(
    options: Resolved, tokens: list[int], encoder_ids: list[int] | None, block_size: int
) -> Request:
    answer = Sequence(options, tokens, encoder_ids)
    if options.num_beams == 1:
        return answer
    return BeamSearch(options, tokens, [answer], block_size, encoder_ids)
