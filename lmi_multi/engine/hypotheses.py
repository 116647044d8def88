"""What beam search decides on the host: which beams run on, which are finished, and when to stop.

As in transformers' `_beam_search`; with several groups as in "Diverse Beam Search" (Vijayakumar et
al., 2018) and transformers' former `group_beam_search`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmi_multi.completion import TokenLogprob
from lmi_multi.engine.batch import Continuation
from lmi_multi.engine.detokenizer import Detokenizer
from lmi_multi.resolved import Resolved


class Hypothesis(NamedTuple):
    """Generated `tokens` and the sum of their processed log-probabilities. `blocks` hold what is
    in the cache, by the numbers that the search gives its blocks. A `detokenizer` is there only
    where stop strings have to be found."""

    tokens: tuple[int, ...] = ()
    score: float = 0.0
    blocks: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    detokenizer: Detokenizer | None = None

    def extended(self, by: Continuation) -> Hypothesis:
        """With one more token."""
        return Hypothesis(
            (*self.tokens, by.token),
            by.score,
            self.blocks,
            self.logprobs if by.logprob is None else (*self.logprobs, by.logprob),
            None if self.detokenizer is None else self.detokenizer.pushed(by.token),
        )

    def on(self, blocks: tuple[int, ...]) -> Hypothesis:
        """The same on other blocks: as `_replace`, in a third of its time."""
        return Hypothesis(self.tokens, self.score, blocks, self.logprobs, self.detokenizer)

    def stopped(self, options: Resolved) -> bool:
        """Whether its last token, or the text that it completes, ends it."""
        return (
            self.tokens[-1] in options.eos_token_ids
            or self.tokens[-1] in options.stop_token_ids
            or (self.detokenizer is not None and self.detokenizer.stopped)
        )


@dataclass(frozen=True)
class Group:
    """The `running` hypotheses, the likeliest first, and the `finished` ones, each with its final
    score, the best first. Nothing runs once it is done."""

    running: tuple[Hypothesis, ...]
    finished: tuple[tuple[float, Hypothesis], ...] = ()


def candidates(options: Resolved) -> int:
    """How many continuations a group must see: those that may end at once, and as many again."""
    ends = len(options.eos_token_ids) + len(options.stop_token_ids)
    return max(2, 1 + ends) * options.group_beams


def continuations(options: Resolved) -> int:
    """How many of a group's best continuations are wanted from the device: enough that the
    candidates are among them when the tokens of other groups have been penalised."""
    others = options.num_beams - options.group_beams
    return candidates(options) + others * options.group_beams


def advance(
    group: Group, best: Sequence[Continuation], taken: Counter[int], options: Resolved
) -> Group:
    """The group after a step, given its beams' `best` continuations and how often the groups
    before it have `taken` each token in this step; what it takes itself is added there."""
    width = options.group_beams
    first: list[Hypothesis] = []  # the candidates of the highest rank: only these may finish
    running: list[Hypothesis] = []
    ended: list[Hypothesis] = []
    for candidate in _penalised(best, taken, options.diversity_penalty)[: candidates(options)]:
        if len(first) == width == len(running):
            break
        hypothesis = group.running[candidate.beam].extended(candidate)
        stopped = hypothesis.stopped(options)
        if not stopped and len(running) < width:
            running.append(hypothesis)
        if len(first) < width:
            first.append(hypothesis)
            if stopped or len(hypothesis.tokens) == options.max_new_tokens:
                ended.append(hypothesis)
    if options.num_beam_groups > 1:
        taken.update(h.tokens[-1] for h in running)
    fresh = [(final_score(h, options), h) for h in ended]
    finished = tuple(sorted((*group.finished, *fresh), key=lambda pair: -pair[0])[:width])
    if not running or len(running[0].tokens) == options.max_new_tokens:
        return Group((), finished)
    best_left = (running if options.num_beam_groups == 1 else first)[0]
    if _is_done(finished, best_left, options):
        return Group((), finished)
    return Group(tuple(running), finished)


def final_score(hypothesis: Hypothesis, options: Resolved) -> float:
    """Its score by which finished ones are compared: over length ** length_penalty, in float32."""
    return _normalized(hypothesis.score, len(hypothesis.tokens), options)


def best_of(groups: Iterable[Group]) -> list[tuple[float, Hypothesis]]:
    """Every finished hypothesis, the best first."""
    pairs = [pair for group in groups for pair in group.finished]
    return sorted(pairs, key=lambda pair: -pair[0])


def _penalised(
    best: Sequence[Continuation], taken: Counter[int], penalty: float
) -> list[Continuation]:
    if not taken:
        return list(best)
    lowered = [c._replace(score=c.score - penalty * taken[c.token]) for c in best]
    return sorted(lowered, key=lambda c: -c.score)


def _is_done(
    finished: Sequence[tuple[float, Hypothesis]], best: Hypothesis, options: Resolved
) -> bool:
    """Whether the search may stop: enough are finished, and the `best` that goes on could not
    become better than the worst of them, as far as the option `early_stopping` cares."""
    if len(finished) < options.group_beams:
        return False
    if options.early_stopping is True:
        return True
    length = len(best.tokens)
    if options.early_stopping == "never" and options.length_penalty > 0:
        length = options.max_new_tokens
    return _normalized(best.score, length, options) <= finished[-1][0]


def _normalized(score: float, length: int, options: Resolved) -> float:
    return float(np.float32(score) / np.float32(length**options.length_penalty))
