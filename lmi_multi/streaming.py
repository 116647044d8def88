"""Answers while they grow: what a step added to each prompt's text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from lmi_multi.completion import FinishReason, TokenLogprob
from lmi_multi.engine.engine import Engine
from lmi_multi.engine.request import Job
from lmi_multi.engine.sequence import Sequence as EngineSequence


@dataclass(frozen=True)
class Chunk:
    """What was added to one prompt's answer.

    `index` is the prompt's place among those given, `answer` the answer's number where a prompt
    has several. `text` holds whole characters only, and may be empty while `token_ids` are not;
    None when the model has no tokenizer. `finish_reason` is set in an answer's last chunk, and
    only there, as is the `score` of an answer that beam search found. `logprobs` has an entry for
    each of `token_ids` if the options ask for them.
    """

    index: int
    text: str | None
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    error: str | None = None
    answer: int = 0
    logprobs: list[TokenLogprob] | None = None
    score: float | None = None


def stream(engine: Engine, jobs: Sequence[Job]) -> Iterator[Chunk]:
    """Run each prompt's job, and yield a chunk for each answer that a step moved on.

    Closing the iterator frees their places.
    """
    views = [View(index, answer) for index, job in enumerate(jobs) for answer in job.answers]
    steps = engine.steps([request for job in jobs for request in job.requests])
    try:
        for _ in steps:
            for view in views:
                if chunk := view.fresh():
                    yield chunk
            views = [view for view in views if not view.ended]
    finally:
        steps.close()


@dataclass
class View:
    """An answer, and how much of it has been shown."""

    index: int
    sequence: EngineSequence
    tokens: int = 0
    pieces: int = 0
    ended: bool = False

    def fresh(self) -> Chunk | None:
        """What is new since the last call; None if nothing is."""
        sequence = self.sequence
        # Read once, and first: another thread's step may end the sequence while we look at it.
        finish = sequence.finish_reason
        tokens = sequence.generated[self.tokens :]
        if self.ended or (not tokens and finish is None):
            return None
        text = None
        if sequence.detokenizer is not None:
            pieces = sequence.pieces[self.pieces :]
            text = "".join(pieces)
            self.pieces += len(pieces)
        logprobs = None
        if sequence.options.logprobs is not None:
            logprobs = sequence.logprobs[self.tokens : self.tokens + len(tokens)]
        self.tokens += len(tokens)
        self.ended = finish is not None
        return Chunk(
            *(self.index, text, tokens, finish, sequence.error, sequence.stream, logprobs),
            score=sequence.score if self.ended else None,
        )


async def in_thread(chunks: Iterator[Chunk]) -> AsyncIterator[Chunk]:
    """The same chunks for asyncio: every step runs in a worker thread.

    When the task is cancelled or the iterator closed, the step that runs is awaited, then the
    places are freed.
    """
    step: asyncio.Future[Chunk | None] | None = None
    try:
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, chunks, None))
            chunk = await asyncio.shield(step)
            if chunk is None:
                return
            yield chunk
    finally:
        if step is not None and not step.done():
            await asyncio.wait([step])
        close = getattr(chunks, "close", None)
        if close is not None:
            close()
