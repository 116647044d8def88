"""One prompt on its way to an answer, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lmi_multi.completion import FinishReason, TokenLogprob
from lmi_multi.engine.batch import Continuations, Draw, Prompt, Row
from lmi_multi.engine.detokenizer import Detokenizer
from lmi_multi.ops.rules import History
from lmi_multi.ops.sampling import SampleRow
from lmi_multi.resolved import Resolved


@dataclass(eq=False)
class Sequence:
    """A `Request` of one row.

    `tokens` are the decoder's: the `given` `first_tokens` (the prompt, or the start token of an
    encoder-decoder), then those generated. The first `computed` of them are in the cache, of which
    `reused` were there before it came, in the first `shared` of its blocks. With a
    `detokenizer`, `pieces` are the text so far. Answers to one prompt differ in `stream`.
    `logprobs` has an entry for each generated token where the options ask for them. The answer of
    a beam search is a sequence too, which nothing runs: the search fills it, and its `score`.
    """

    width: ClassVar[int] = 1  # see `Request.width`
    tokens_of_step: ClassVar[int] = 1  # see `Request.tokens_of_step`

    options: Resolved
    tokens: list[int]
    encoder_ids: list[int] | None = None
    detokenizer: Detokenizer | None = None
    first_tokens: list[int] = field(init=False)
    given: int = field(init=False)
    longest: int = field(init=False)  # the most decoder tokens that it can reach
    computed: int = 0
    reused: int = 0
    shared: int = 0
    blocks: list[int] = field(default_factory=list)
    cross_blocks: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    stream: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    score: float | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    _history: History = field(init=False)  # holds `tokens` themselves, and so all that come
    # How the next draw will be made, if that is known.
    _ahead: SampleRow | None = field(init=False, default=None)
    _fresh: bool = field(init=False, default=True)  # no step has had it yet
    # What `blocks` and `cross_blocks` were when it started, for its rows: whoever leaves while a
    # step runs empties them.
    _own: tuple[int, ...] = field(init=False, default=())
    _cross: tuple[int, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        self.first_tokens = list(self.tokens)
        self.given = len(self.tokens)
        self._history = History(self.tokens, self.given, self.encoder_ids or ())
        self.longest = self.given + self.options.max_new_tokens

    @property
    def generated(self) -> list[int]:
        """The tokens drawn so far."""
        return self.tokens[self.given :]

    @property
    def shown(self) -> list[int]:
        """The tokens that the text is made of: not the stop token that ended it."""
        stopped = self.tokens[-1] in self.options.stop_token_ids
        return self.generated[:-1] if stopped and self.finish_reason == "stop" else self.generated

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum over the generated tokens; None unless the options ask for log-probabilities."""
        if self.options.logprobs is None:
            return None
        return sum(entry.logprob for entry in self.logprobs)

    def goes_ahead(self, follows: bool) -> bool:
        """See `Request.goes_ahead`."""
        return follows or self.options.goes_ahead

    @property
    def pending(self) -> int:
        """See `Request.pending`."""
        return len(self.tokens) - self.computed

    def blocks_needed(self, size: int) -> tuple[int, int]:
        """See `Request.blocks_needed`."""
        # The last token drawn is never fed back, so it needs no place.
        own = -(-(self.longest - 1) // size)
        return max(own, 1), -(-len(self.encoder_ids or ()) // size)

    def prompt(self) -> Prompt:
        """See `Request.prompt`."""
        return Prompt(self.encoder_ids or [], None, tuple(self.cross_blocks))

    def rows(self, count: int) -> list[Row]:
        """See `Request.rows`."""
        start, tokens = self.computed, self.tokens
        stop = start + count
        sample = ahead = next_token = None
        if stop == len(tokens):
            drawn = stop - self.given
            sample = self._ahead
            if sample is None or sample.step != drawn:
                sample = self.options.row(drawn, self._history, self.stream)
            ahead = self._ahead = self.options.ahead(drawn + 1, self._history, self.stream)
        elif stop + 1 == len(tokens):
            next_token = tokens[stop]
            first = stop + 1 - self.given
            ahead = self._ahead = self.options.ahead(first, self._history, self.stream)
        fresh: tuple[int, ...] = ()
        if self._fresh:
            fresh, self._fresh = (*self._own[self.shared :], *self._cross), False
        encoded = len(self.encoder_ids or ())
        # By place: it takes half the time, and there is one for each sequence of each step.
        row = Row(
            tokens[start:stop], start, self._own, self.given, self._cross, encoded,
            sample, ahead, None, fresh, (), next_token,
        )  # fmt: skip
        return [row]

    def accept(self, draws: Iterator[Draw | Continuations]) -> None:
        """See `Request.accept`."""
        own: Iterator[Any] = draws  # no `cast`: that is a call for each sequence of each step
        token, finite, logprob = next(own)
        if self.finish_reason is not None:
            return
        if finite:
            self.push(token, logprob)
        else:
            self.fail(not_finite(len(self.generated), self.options))

    def push(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Add a generated token, and see whether the sequence ends with it."""
        if logprob is not None:  # first, so that whoever sees the token finds it
            self.logprobs.append(logprob)
        self.tokens.append(token)
        reason: FinishReason | None = None
        if token in self.options.end_token_ids:
            reason = "eos" if token in self.options.eos_token_ids else "stop"
        elif self.detokenizer is not None:
            self.pieces.append(self.detokenizer.push(token))
            if self.detokenizer.stopped:
                reason = "stop"
        if reason is None and len(self.tokens) == self.longest:
            reason = "length"
        if reason is not None:
            self._finish(reason)

    def fail(self, error: str, reason: FinishReason = "numerical_error") -> None:
        """See `Request.fail`."""
        self.error = error
        self._finish(reason)

    def advance(self, length: int) -> None:
        """See `Request.advance`."""
        self.computed = length

    def start(self, reused: int, shared: int) -> None:
        """See `Request.start`."""
        self.reused = self.computed = reused
        self.shared, self._fresh = shared, True
        self._own, self._cross = tuple(self.blocks), tuple(self.cross_blocks)

    def cancel(self) -> None:
        """See `Request.cancel`."""
        self.finish_reason = self.finish_reason or "cancelled"

    def _finish(self, reason: FinishReason) -> None:
        """The reason comes last: another thread that sees it finds all else in place."""
        if self.detokenizer is not None:
            self.pieces.append(self.detokenizer.flush())
        self.finish_reason = reason


def not_finite(token: int, options: Resolved) -> str:
    """What to say when generated token number `token` could not be drawn."""
    error = f"logits of generated token {token} hold NaN or infinity"
    return error + (", or the options exclude every token" if options.excludes else "")
