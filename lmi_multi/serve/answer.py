"""An answer that grows with its chunks, and their text."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lmi_multi.completion import FinishReason, TokenLogprob
from lmi_multi.engine.detokenizer import Detokenizer
from lmi_multi.serve.errors import HttpError
from lmi_multi.streaming import Chunk
from lmi_multi.tokenizer import Tokenizer


@dataclass
class Answer:
    """One whole answer."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "cancelled"
    logprobs: list[TokenLogprob] = field(default_factory=list)
    score: float | None = None

    def add(self, chunk: Chunk) -> None:
        """Take the next chunk of it. Raises HttpError if the answer has failed."""
        if chunk.error is not None:
            raise HttpError.of_answer(chunk.finish_reason, chunk.error)
        self.text += chunk.text or ""
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs or []
        self.finish_reason = chunk.finish_reason or self.finish_reason
        self.score = chunk.score if chunk.score is not None else self.score


class GrowingTexts:
    """Makes the text of chunks that have none, so that the engine need not: for every answer of a
    request the text of its chunks so far. Without a tokenizer they stay as they are."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._growing: dict[tuple[int, int], Detokenizer] = {}

    def with_text(self, chunk: Chunk) -> Chunk:
        """The next chunk of its answer, with its text."""
        if self._tokenizer is None or chunk.text is not None:
            return chunk
        key = chunk.index, chunk.answer
        growing = self._growing.get(key)
        if growing is None:
            growing = self._growing[key] = Detokenizer(self._tokenizer)
        # The token that ended the answer is no part of its text.
        ended = chunk.finish_reason in ("eos", "stop")
        pieces = [growing.push(token) for token in chunk.token_ids[: -1 if ended else None]]
        if chunk.finish_reason is not None:
            pieces.append(growing.flush())
        return replace(chunk, text="".join(pieces))
