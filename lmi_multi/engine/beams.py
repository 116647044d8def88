"""Beam search as one request of several rows that share cache blocks."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from lmi_multi.completion import FinishReason
from lmi_multi.engine import hypotheses, sequence
from lmi_multi.engine.batch import Continuations, Draw, Prompt, Row
from lmi_multi.engine.detokenizer import Detokenizer
from lmi_multi.engine.hypotheses import Group, Hypothesis
from lmi_multi.ops.beams import Beams, Going
from lmi_multi.ops.sampling import SampleRow
from lmi_multi.resolved import Resolved

_numbers = itertools.count(1)


@dataclass(frozen=True)
class _State:
    """Everything that a step changes, so that it changes at once: an interrupt (Ctrl-C) leaves
    one state or the next. Blocks have the numbers of their places in `BeamSearch.blocks`; before
    the next step `fresh` ones are zeroed, and each pair of `copies` is copied."""

    groups: tuple[Group, ...]
    drawn: int = 0
    fresh: tuple[int, ...] = ()
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def rows(self) -> list[Hypothesis]:
        return [beam for group in self.groups for beam in group.running]


class BeamSearch:
    """A `Request` of `num_beams` rows, which fills `answers`, the best first.

    The prompt is computed once. Beams share its blocks, and later ones for as long as they have
    the same tokens: a block is copied when one of several beams in it goes on. All of them read
    the same encoded prompt.
    """

    def __init__(
        self,
        options: Resolved,
        tokens: Sequence[int],
        answers: Sequence[sequence.Sequence],
        block_size: int,
        encoder_ids: list[int] | None = None,
        detokenizer: Detokenizer | None = None,
    ) -> None:
        self.options = options
        self.encoder_ids = encoder_ids
        self.blocks: list[int] = []
        self.cross_blocks: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._given = list(tokens)
        self._answers = answers
        self._size = block_size
        self._prefilled = self._reused = self._shared = 0
        prompt = tuple(range(-(-len(tokens) // block_size)))
        beam = Hypothesis(blocks=prompt, detokenizer=detokenizer)
        self._start = _State((Group((beam,)),) * options.num_beam_groups)
        self._state = self._start
        self._own_blocks: tuple[tuple[int, ...], ...] = ()
        self._search = next(_numbers)

    @property
    def first_tokens(self) -> list[int]:
        """See `Request.first_tokens`."""
        return self._given

    @property
    def width(self) -> int:
        """See `Request.width`."""
        return self.options.num_beams

    @property
    def computed(self) -> int:
        """See `Request.computed`."""
        drawn = self._state.drawn
        return len(self._given) + drawn - 1 if drawn else self._prefilled

    @property
    def pending(self) -> int:
        """See `Request.pending`."""
        return len(self._given) + self._state.drawn - self.computed

    @property
    def goes_ahead(self) -> bool:
        """See `Request.goes_ahead`."""
        return self.options.goes_ahead

    @property
    def tokens_of_step(self) -> int:
        """See `Request.tokens_of_step`."""
        return len(self._state.rows) if self._state.drawn else 1

    def blocks_needed(self, size: int) -> tuple[int, int]:
        """See `Request.blocks_needed`."""
        shared = len(self._given) // size
        own = shared + self.width * (-(-self._longest // size) - shared)
        return max(own, 1), -(-len(self.encoder_ids or ()) // size)

    def prompt(self) -> Prompt:
        """See `Request.prompt`."""
        return Prompt(self.encoder_ids or [], None, tuple(self.cross_blocks))

    def rows(self, count: int) -> list[Row]:
        """See `Request.rows`."""
        state = self._state
        if not state.drawn:
            return [self._prefill(count)]
        sample, going = self.options.ahead(state.drawn), self._going(state)
        rows = [
            self._row(beam, group.running if place == 0 else (), sample, going)
            for group in state.groups
            for place, beam in enumerate(group.running)
        ]
        copies = tuple((self.blocks[a], self.blocks[b]) for a, b in state.copies)
        rows[0] = rows[0]._replace(fresh=self._own(state.fresh), copies=copies)
        return rows

    def accept(self, draws: Iterator[Draw | Continuations]) -> None:
        """See `Request.accept`."""
        state = self._state
        if state.drawn:
            found = [cast(Continuations, next(draws)) if g.running else None for g in state.groups]
        else:  # one row, with which all groups begin
            found = [cast(Continuations, next(draws))] * len(state.groups)
        if self.finish_reason is not None:
            return
        if not all(own is None or own.finite for own in found):
            self.fail(self._not_finite)
            return
        groups: list[Group] = []
        taken: Counter[int] = Counter()
        for group, own in zip(state.groups, found, strict=True):
            if own is not None:
                group = hypotheses.advance(group, own.best, taken, self.options)
            groups.append(group)
        if any(group.running for group in groups):
            self._state = self._placed(groups, state.drawn + 1)
        else:
            self._answer(groups)

    def advance(self, length: int) -> None:
        """See `Request.advance`."""
        if not self._state.drawn:
            self._prefilled = length

    def start(self, reused: int, shared: int) -> None:
        """See `Request.start`."""
        self._prefilled = self._reused = reused
        self._shared = shared
        self._state = self._start
        self._own_blocks = ()
        self._search = next(_numbers)

    def cancel(self) -> None:
        """See `Request.cancel`."""
        for answer in self._answers:
            answer.cancel()
        self.finish_reason = self.finish_reason or "cancelled"

    def fail(self, error: str, reason: FinishReason = "numerical_error") -> None:
        """See `Request.fail`."""
        for answer in self._answers:
            answer.fail(error, reason)
        self.finish_reason = reason

    def _prefill(self, count: int) -> Row:
        stop = self._prefilled + count
        row = self._row(self._start.rows[0], self._start.rows[:1])
        fresh: tuple[int, ...] = ()
        if self._prefilled == self._reused:  # its first step
            fresh = (*row.blocks[self._shared :], *row.cross_blocks)
        whole = stop == len(self._given)
        return row._replace(
            token_ids=self._given[self._prefilled : stop],
            start=self._prefilled,
            sample=row.sample if whole else None,
            beams=row.beams if whole else None,
            fresh=fresh,
        )

    def _row(
        self,
        beam: Hypothesis,
        group: Sequence[Hypothesis],
        sample: SampleRow | None = None,
        going: Going | None = None,
    ) -> Row:
        """One beam's last token; the first of a group asks for the whole group. `sample` is None
        where it depends on the beam's tokens."""
        encoder_ids = self.encoder_ids or ()
        if sample is None:
            tokens = [*self._given, *beam.tokens]
            sample = self.options.row(len(beam.tokens), tokens, encoder_ids)
        beams = None
        if group:
            scores = tuple(own.score for own in group)
            beams = Beams(scores, hypotheses.continuations(self.options), going, self._search)
        return Row(
            token_ids=[beam.tokens[-1] if beam.tokens else self._given[-1]],
            start=len(self._given) + len(beam.tokens) - 1,
            blocks=self._own(beam.blocks),
            prompt_length=len(self._given),
            cross_blocks=tuple(self.cross_blocks),
            cross_length=len(encoder_ids),
            sample=sample,
            beams=beams,
        )

    def _going(self, state: _State) -> Going | None:
        """See `Beams.going`."""
        options, beams = self.options, state.rows
        sample = options.ahead(state.drawn + 1)
        if sample is None or options.num_beam_groups > 1 or beams[0].detokenizer is not None:
            return None
        if len(beams) < self.width:  # a vocabulary that small: there will be more of them
            return None
        if not self._own_blocks:
            places = range(-(-self._longest // self._size))
            self._own_blocks = tuple(
                self._own([self._number(place, row) for place in places])
                for row in range(self.width)
            )
        return Going((*options.eos_token_ids, *options.stop_token_ids), self._own_blocks, sample)

    @property
    def _longest(self) -> int:
        """The most tokens of a beam that are in the cache."""
        return len(self._given) + self.options.max_new_tokens - 1

    def _number(self, place: int, row: int) -> int:
        """That of a row's own block for a place among its blocks: behind the prompt's full blocks,
        which all rows share, there is one for each row."""
        shared = len(self._given) // self._size
        return place if place < shared else shared + (place - shared) * self.width + row

    def _own(self, numbers: Sequence[int]) -> tuple[int, ...]:
        return tuple(map(self.blocks.__getitem__, numbers))

    def _placed(self, groups: Sequence[Group], drawn: int) -> _State:
        """The next state: every beam gets a block of its own for the token that it adds, as `Going`
        says."""
        beams = [beam for group in groups for beam in group.running]
        place = (len(self._given) + drawn - 1) // self._size
        first = self._number(place, 0)
        own = range(first, first + self.width)
        copies: list[tuple[int, int]] = []
        if len(beams[0].blocks) == place:  # and so are all
            fresh = tuple(own[: len(beams)])
            beams = [beam.on((*beam.blocks, own[i])) for i, beam in enumerate(beams)]
        else:
            fresh, held = (), [beam.blocks[place] for beam in beams]
            unused = (number for number in own if number not in held)
            for i, beam in enumerate(beams):
                if held[i] in held[i + 1 :]:
                    copies.append((held[i], next(unused)))
                    beams[i] = beam.on((*beam.blocks[:place], copies[-1][1]))
        rest = iter(beams)
        done = (Group(tuple(next(rest) for _ in g.running), g.finished) for g in groups)
        return _State(tuple(done), drawn, fresh, tuple(copies))

    @property
    def _not_finite(self) -> str:
        return sequence.not_finite(self._state.drawn, self.options)

    def _answer(self, groups: Sequence[Group]) -> None:
        """Fill the answers and end. Done twice, as when an interrupt came between, it goes on
        where it stopped."""
        best = hypotheses.best_of(groups)
        for number, answer in enumerate(self._answers):
            if number >= len(best):
                few = (
                    f"the options leave only {len(best)} different answers"
                    if best
                    else self._not_finite
                )
                answer.fail(few)
                continue
            score, beam = best[number]
            answer.score = score
            logprobs = beam.logprobs or (None,) * len(beam.tokens)
            for place in range(len(answer.generated), len(beam.tokens)):
                answer.push(beam.tokens[place], logprobs[place])
        self.finish_reason = self._answers[0].finish_reason
