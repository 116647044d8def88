"""The bodies of OpenAI's requests, as they are checked."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool


class StreamOptions(BaseModel):
    """What a stream tells beside its chunks."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: StrictBool = False


class Generation(BaseModel):
    """What both kinds of completion take; beyond OpenAI's, options of this package."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = ""
    n: int | None = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    user: str | None = None  # whose request it is: changes nothing
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Any = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Any = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    min_new_tokens: int | None = None
    no_repeat_ngram_size: int | None = None
    bad_words: Any = None
    stop_token_ids: Any = None
    ignore_eos: StrictBool | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: Any = None
    do_sample: StrictBool | None = None


class CompletionRequest(Generation):
    """The body of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: StrictBool = False


class ChatRequest(Generation):
    """The body of `/v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: StrictBool = False
    top_logprobs: int | None = None


class EmbeddingRequest(BaseModel):
    """The body of `/v1/embeddings`; `pooling` and `normalize` are this package's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = ""
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None
    pooling: Literal["mean", "cls", "last"] = "mean"
    normalize: StrictBool = True
