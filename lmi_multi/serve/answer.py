"""An answer that grows with its chunks."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmi_multi.options import FinishReason, TokenLogprob
from lmi_multi.serve.errors import HttpError
from lmi_multi.streaming import Chunk


@dataclass
class Answer:
    """One whole answer."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "cancelled"
    logprobs: list[TokenLogprob] = field(default_factory=list)
    score: float | None = None

    def add(self, chunk: Chunk) -> None:
        """Take the next chunk of it. Raises HttpError 500 if the answer has failed."""
        if chunk.error is not None:
            raise HttpError(500, f"{chunk.finish_reason}: {chunk.error}")
        self.text += chunk.text or ""
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs or []
        self.finish_reason = chunk.finish_reason or self.finish_reason
        self.score = chunk.score if chunk.score is not None else self.score
