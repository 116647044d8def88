"""How long an engine takes for a first token, and for each after it."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from statistics import median

from lmi_multi.defaults import GenerationDefaults
from lmi_multi.engine.beams import BeamSearch
from lmi_multi.engine.engine import Engine
from lmi_multi.engine.request import Request
from lmi_multi.engine.sequence import Sequence
from lmi_multi.models.spec import ModelSpec
from lmi_multi.models.traits import Traits
from lmi_multi.options import GenerateOptions
from lmi_multi.resolved import Resolved


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


def time_generation(
    engine: Engine,
    spec: ModelSpec | Traits,
    rows: int,
    prompt: int,
    tokens: int,
    rounds: int,
    beams: int = 1,
) -> Timing:
    """Answer random prompts of `prompt` tokens with exactly `tokens` > 1 tokens, in steps of `rows`
    rows: of a prompt each, greedily, or of `beams` beams of a prompt."""
    chance = random.Random(rows)
    prompts = [
        [chance.randrange(2, spec.vocab) for _ in range(prompt)] for _ in range(rows // beams)
    ]
    _run(engine, spec, prompts, tokens, beams)  # whatever is made on first use
    first = median(_run(engine, spec, prompts, 1, beams) for _ in range(rounds))
    whole = median(_run(engine, spec, prompts, tokens, beams) for _ in range(rounds))
    return Timing(rows, first, whole, (whole - first) / (tokens - 1))


def _run(
    engine: Engine, spec: ModelSpec | Traits, prompts: list[list[int]], tokens: int, beams: int
) -> float:
    decoder_only = spec.kind == "decoder"
    limits = engine.executor.limits
    defaults = GenerationDefaults(decoder_start_token_id=0)
    options = defaults.resolve(
        GenerateOptions(max_new_tokens=tokens, num_beams=beams),
        prompt_tokens=len(prompts[0]),
        decoder_only=decoder_only,
        limit=limits.max_tokens,
    )
    requests = [
        _request(options, list(own), None, limits.block_size)
        if decoder_only
        else _request(options, [0], list(own), limits.block_size)
        for own in prompts
    ]
    start = time.perf_counter()
    engine.run(requests)
    return (time.perf_counter() - start) * 1000


def _request(
    options: Resolved, tokens: list[int], encoder_ids: list[int] | None, block_size: int
) -> Request:
    answer = Sequence(options, tokens, encoder_ids)
    if options.num_beams == 1:
        return answer
    return BeamSearch(options, tokens, [answer], block_size, encoder_ids)
