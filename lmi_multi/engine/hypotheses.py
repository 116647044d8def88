"""What beam search decides on the host: which beams run on, which are finished, and when to stop.

As in transformers' `_beam_search`; with several groups as in "Diverse Beam Search" (Vijayakumar et
al., 2018) and transformers' former `group_beam_search`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lmi_multi.completion import TokenLogprob
from lmi_multi.engine.batch import Continuation
from lmi_multi.engine.detokenizer import Detokenizer
from lmi_multi.resolved import Resolved


class Hypothesis(NamedTuple):
    """Generated `tokens` and the sum of their processed log-probabilities. It continues number
    `parent` of those that ran in its group before. A `detokenizer` is there only where stop strings
    have to be found."""

    tokens: tuple[int, ...] = ()
    score: float = 0.0
    parent: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    detokenizer: Detokenizer | None = None

    def extended(self, by: Continuation) -> Hypothesis:
        """With one more token."""
        return Hypothesis(
            self.tokens + (by.token,),  # half the time of a display's unpacking
            by.score,
            by.beam,
            self.logprobs if by.logprob is None else (*self.logprobs, by.logprob),
            None if self.detokenizer is None else self.detokenizer.pushed(by.token),
        )

    def stopped(self, options: Resolved) -> bool:
        """Whether its last token, or the text that it completes, ends it."""
        return self.tokens[-1] in options.end_token_ids or (
            self.detokenizer is not None and self.detokenizer.stopped
        )


class Group(NamedTuple):
    """The `running` hypotheses, the likeliest first, and the `finished` ones, each with its final
    score, the best first. Nothing runs once it is done."""

    running: tuple[Hypothesis, ...]
    finished: tuple[tuple[float, Hypothesis], ...] = ()


def candidates(options: Resolved) -> int:
    """How many continuations a group must see: those that may end at once, and as many again."""
    return max(2, 1 + len(options.end_token_ids)) * options.group_beams


def continuations(options: Resolved) -> int:
    """How many of a group's best continuations are wanted from the device: enough that the
    candidates are among them when the tokens of other groups have been penalised."""
    others = options.num_beams - options.group_beams
    return candidates(options) + others * options.group_beams


def advance(
    group: Group, best: Sequence[Continuation], taken: dict[int, int], options: Resolved
) -> Group:
    """The group after a step, given its beams' `best` continuations and how often the groups
    before it have `taken` each token in this step; what it takes itself is added there."""
    width, alone = options.group_beams, options.num_beam_groups == 1
    length = len(group.running[0].tokens) + 1
    seen = _penalised(best, taken, options.diversity_penalty)[: candidates(options)]
    running: list[Hypothesis] = []
    ended: list[Hypothesis] = []
    for rank, candidate in enumerate(seen):
        if rank >= width == len(running):
            break
        hypothesis = group.running[candidate.beam].extended(candidate)
        stopped = hypothesis.stopped(options)
        if not stopped and len(running) < width:
            running.append(hypothesis)
        if rank < width and (stopped or length == options.max_new_tokens):  # no other may finish
            ended.append(hypothesis)
    if not alone:
        for hypothesis in running:
            taken[hypothesis.tokens[-1]] = taken.get(hypothesis.tokens[-1], 0) + 1
    finished = _with(group.finished, ended, options)
    if not running or length == options.max_new_tokens:
        return Group((), finished)
    best_left = running[0].score if alone else seen[0].score
    if _is_done(finished, best_left, length, options):
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
    best: Sequence[Continuation], taken: Mapping[int, int], penalty: float
) -> Sequence[Continuation]:
    if not taken:
        return best
    lowered = [c._replace(score=c.score - penalty * taken.get(c.token, 0)) for c in best]
    return sorted(lowered, key=lambda c: -c.score)


def _with(
    finished: tuple[tuple[float, Hypothesis], ...],
    ended: Sequence[Hypothesis],
    options: Resolved,
) -> tuple[tuple[float, Hypothesis], ...]:
    """The best of those that had `finished` and those that have `ended` now."""
    if not ended:
        return finished
    fresh = [(final_score(h, options), h) for h in ended]
    return tuple(sorted((*finished, *fresh), key=lambda p: -p[0])[: options.group_beams])


def _is_done(
    finished: Sequence[tuple[float, Hypothesis]], best: float, length: int, options: Resolved
) -> bool:
    """Whether the search may stop: enough are finished, and the one of `length` tokens that goes on
    with the `best` score could not become better than the worst of them, as far as the option
    `early_stopping` cares."""
    if len(finished) < options.group_beams:
        return False
    if options.early_stopping is True:
        return True
    if options.early_stopping == "never" and options.length_penalty > 0:
        length = options.max_new_tokens
    return _normalized(best, length, options) <= finished[-1][0]


def _normalized(score: float, length: int, options: Resolved) -> float:
    return float(np.float32(score) / np.float32(length**options.length_penalty))
