"""What comes back from `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["eos", "length", "stop", "numerical_error", "out_of_memory", "cancelled"]


@dataclass(frozen=True)
class TokenLogprob:
    """One generated token: `logprob` is its log-probability by the model itself, before penalties,
    bans and temperature; `top` are the likeliest tokens with theirs, the likeliest first."""

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(frozen=True)
class Completion:
    """What one prompt became.

    - `prompt`: as given, a string or token ids; `prompt_token_ids`: what the model read.
    - `token_ids`: every token that was generated, the end token included where one was.
    - `text`: those tokens as text, without special tokens and, when a stop string appeared, only
      up to it (`token_ids` still holds all). None when the model has no tokenizer.
    - `finish_reason`: "eos" an end token came; "length" `max_new_tokens`, or the model's limit,
      was reached; "stop" a stop string or a token of `stop_token_ids` appeared;
      "numerical_error" the logits were not finite, or no token was allowed; "out_of_memory" a step
      with it did not fit the GPU; `error` says more of both; "cancelled" the caller went away.
    - `score`: of an answer that beam search found, the one by which it was compared.
    - `logprobs`: one entry for each of `token_ids`, and `cumulative_logprob` their sum; None
      unless the option `logprobs` asks for them. `prompt_logprobs`: one for each of
      `prompt_token_ids`, None for the first, which nothing predicts.
    """

    prompt: str | list[int]
    prompt_token_ids: list[int]
    text: str | None
    token_ids: list[int]
    finish_reason: FinishReason
    error: str | None = None
    logprobs: list[TokenLogprob] | None = None
    cumulative_logprob: float | None = None
    prompt_logprobs: list[float | None] | None = None
    score: float | None = None
