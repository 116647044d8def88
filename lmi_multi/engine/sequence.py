"""One prompt on its way to an answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmi_multi.defaults import Resolved
from lmi_multi.engine.batch import Prompt, Row
from lmi_multi.engine.detokenizer import Detokenizer
from lmi_multi.options import FinishReason, TokenLogprob


@dataclass(eq=False)
class Sequence:
    """`tokens` are the decoder's: those given (the prompt, or the start token of an
    encoder-decoder), then those generated. The first `computed` of them are in the cache. With a
    `detokenizer`, `pieces` are the text so far. Answers to one prompt differ in `stream`.
    `logprobs` has an entry for each generated token where the options ask for them."""

    options: Resolved
    tokens: list[int]
    encoder_ids: list[int] | None = None
    detokenizer: Detokenizer | None = None
    given: int = field(init=False)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    cross_blocks: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    stream: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        self.given = len(self.tokens)

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

    @property
    def longest(self) -> int:
        """The most decoder tokens that this sequence can reach."""
        return self.given + self.options.max_new_tokens

    def prompt(self) -> Prompt:
        """Its encoder work."""
        return Prompt(self.encoder_ids or [], None, tuple(self.cross_blocks))

    def row(self, count: int) -> Row:
        """Its share of a step that computes `count` more tokens."""
        stop = self.computed + count
        sample = None
        if stop == len(self.tokens):
            drawn = stop - self.given
            sample = self.options.row(drawn, self.tokens, self.encoder_ids or (), self.stream)
        return Row(
            token_ids=self.tokens[self.computed : stop],
            start=self.computed,
            blocks=tuple(self.blocks),  # the caller may leave, and empty it, while the step runs
            prompt_length=self.given,
            cross_blocks=tuple(self.cross_blocks),
            cross_length=len(self.encoder_ids or ()),
            sample=sample,
        )

    def accept(self, token: int, finite: bool, logprob: TokenLogprob | None = None) -> None:
        """Take the token that a step drew, and see whether the sequence ends with it."""
        if not finite:
            self.error = f"logits of generated token {len(self.generated)} hold NaN or infinity"
            if self.options.excludes:
                self.error += ", or the options exclude every token"
            self._finish("numerical_error")
            return
        if logprob is not None:  # first, so that whoever sees the token finds it
            self.logprobs.append(logprob)
        self.tokens.append(token)
        reason: FinishReason | None = None
        if token in self.options.eos_token_ids:
            reason = "eos"
        elif token in self.options.stop_token_ids:
            reason = "stop"
        elif self.detokenizer is not None:
            self.pieces.append(self.detokenizer.push(token))
            if self.detokenizer.stopped:
                reason = "stop"
        if reason is None and len(self.tokens) == self.longest:
            reason = "length"
        if reason is not None:
            self._finish(reason)

    def _finish(self, reason: FinishReason) -> None:
        """The reason comes last: another thread that sees it finds all else in place."""
        if self.detokenizer is not None:
            self.pieces.append(self.detokenizer.flush())
        self.finish_reason = reason
