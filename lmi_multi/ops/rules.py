"""By which rules bias and earlier tokens change what a row draws, and what that is in a step.

Rules are the same in all steps of a row, so an executor that keeps the tokens itself can follow
them without being told what they come to. Host code: `Rules.edit` and `Rules.bans` are the
reference for that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

from lmi_multi.ops.bans import ngram_bans, word_bans
from lmi_multi.ops.processors import Edit


class History(NamedTuple):
    """What a row has read and drawn.

    `tokens` are the decoder's, the first `given` of which were given to it; at least as many as the
    draw depends on. It may be a list that grows afterwards: the draw of step s looks at the first
    `given` + s only. `encoded`: an encoder-decoder's prompt.
    """

    tokens: Sequence[int]
    given: int
    encoded: Sequence[int] = ()

    def before(self, step: int) -> Sequence[int]:
        """The tokens that the draw of `step` looks at. Raises ValueError if there are fewer."""
        count = self.given + step
        if len(self.tokens) < count:
            raise ValueError(f"step {step} depends on {count} tokens, there are {len(self.tokens)}")
        return self.tokens[:count]


@dataclass(frozen=True)
class Rules:
    """What bias and earlier tokens do to a row's logits: the same in all steps.

    `bias`: distinct ids and what is added to their logits. The repetition penalties are above 0,
    and 1 is off. `presence_penalty` and `frequency_penalty` are OpenAI's, 0 is off.
    `no_repeat_ngram_size` >= 0, 0 is off. `bad_words` have at least one id each.
    """

    bias: tuple[tuple[int, float], ...] = ()
    encoder_repetition_penalty: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Once: words and biases may be thousands, and rows are looked up by their rules."""
        return hash(tuple(getattr(self, own.name) for own in fields(self)))

    @cached_property
    def reads_tokens(self) -> bool:
        """Whether a draw depends on the tokens before it: all but the bias does."""
        return self != Rules(bias=self.bias)

    def edit(self, history: History | None, step: int) -> Edit | None:
        """Bias and penalties in a step; None where there are none.

        Nothing here looks for padding: a sequence has none, and a token that was read or drawn
        counts whatever its id. Raises ValueError if the rules read tokens that `history` lacks.
        """
        if not self.reads_tokens:
            return Edit(bias=self.bias) if self.bias else None
        tokens, given, encoded = _known(history, step)
        repeats, prompt = self.repetition_penalty != 1, self.encoder_repetition_penalty != 1
        edit = Edit(
            bias=self.bias,
            prompt=_distinct(encoded or tokens[:given]) if prompt else (),
            encoder_repetition_penalty=self.encoder_repetition_penalty,
            seen=_distinct(tokens) if repeats else (),
            repetition_penalty=self.repetition_penalty,
            counted=self._counted(tokens[given:]),
        )
        return edit if edit.bias or edit.prompt or edit.seen or edit.counted else None

    def bans(self, history: History | None, step: int) -> tuple[int, ...]:
        """The distinct ids that n-grams and words forbid in a step. Raises ValueError if they
        depend on tokens that `history` lacks."""
        if not self.no_repeat_ngram_size and not self.bad_words:
            return ()
        tokens = _known(history, step).tokens
        banned = word_bans(tokens, self.bad_words)
        if self.no_repeat_ngram_size:
            banned = ngram_bans(tokens, self.no_repeat_ngram_size) + banned
        return _distinct(banned)

    def _counted(self, generated: Sequence[int]) -> tuple[tuple[int, float], ...]:
        """What presence and frequency add to the logit of each generated token: mostly less."""
        if not self.presence_penalty and not self.frequency_penalty:
            return ()
        counts = Counter(generated).items()
        return tuple(
            (token, -self.presence_penalty - self.frequency_penalty * count)
            for token, count in counts
        )


def _known(history: History | None, step: int) -> History:
    """The history as it is before the draw of `step`."""
    if history is None:
        raise ValueError("these rules read tokens, and there is no history")
    return history._replace(tokens=history.before(step))


def _distinct(tokens: Sequence[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(tokens))
