"""Beam search as one request of several rows that share cache blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

from lmi_multi.completion import FinishReason
from lmi_multi.engine import hypotheses, sequence
from lmi_multi.engine.batch import Continuations, Draw, Prompt, Row
from lmi_multi.engine.detokenizer import Detokenizer
from lmi_multi.engine.hypotheses import Group, Hypothesis
from lmi_multi.ops.beams import Beams, Going
from lmi_multi.ops.rules import History
from lmi_multi.ops.sampling import SampleRow
from lmi_multi.resolved import Resolved

_numbers = itertools.count(1)


class _State(NamedTuple):
    """Everything that a step changes, so that it changes at once: an interrupt (Ctrl-C) leaves
    one state or the next. There are `blocks` of the cache for each running beam, one group's behind
    the other's. Before the next step `fresh` ones are zeroed, and each pair of `copies` is copied.
    """

    groups: Sequence[Group]
    blocks: Sequence[tuple[int, ...]]
    drawn: int = 0
    fresh: Sequence[int] = ()
    copies: Sequence[tuple[int, int]] = ()


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
        self._detokenizer = detokenizer
        self._ahead: SampleRow | None = None  # the next step's, where it is known
        self._keep = hypotheses.continuations(options)
        self._state: _State
        self.start(0, 0)

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
        return 1 if self._state.drawn else len(self._given) - self._prefilled

    def goes_ahead(self, follows: bool) -> bool:
        """See `Request.goes_ahead`."""
        return self.options.goes_ahead  # its tokens are beams', which only a ranking knows

    @property
    def tokens_of_step(self) -> int:
        """See `Request.tokens_of_step`."""
        return len(self._state.blocks) if self._state.drawn else 1

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
        known, self._ahead = self._ahead, self._alike(state.drawn + 1)
        sample = known if known and known.step == state.drawn else self._alike(state.drawn)
        going = self._going(state)
        start, given, encoded = self.computed, len(self._given), len(self.encoder_ids or ())
        each, fresh, copies = iter(state.blocks), state.fresh, state.copies
        rows: list[Row] = []
        for group in state.groups:
            beams: Beams | None = self._beams(group.running, going)
            for beam in group.running:
                # By place: it takes half the time, and there is one for each beam of each step.
                row = Row(
                    [beam.tokens[-1]], start, next(each), given, self._cross, encoded,
                    sample or self._sample(beam), None, beams, fresh, copies,
                )  # fmt: skip
                rows.append(row)
                beams, fresh, copies = None, (), ()  # those are for first rows
        return rows

    def accept(self, draws: Iterator[Draw | Continuations]) -> None:
        """See `Request.accept`."""
        state, found = self._state, cast("Iterator[Continuations]", draws)
        if state.drawn:
            each = [next(found) if group.running else None for group in state.groups]
        else:  # one row, with which all groups begin
            each = [next(found)] * len(state.groups)
        if self.finish_reason is not None:
            return
        groups: list[Group] = []
        blocks: list[tuple[int, ...]] = []
        taken: dict[int, int] = {}
        first = 0  # of a group's rows
        for group, own in zip(state.groups, each, strict=True):
            if own is not None:
                if not own.finite:
                    self.fail(self._not_finite)
                    return
                advanced = hypotheses.advance(group, own.best, taken, self.options)
                blocks += [state.blocks[first + beam.parent] for beam in advanced.running]
                first += len(group.running)
                group = advanced
            groups.append(group)
        if blocks:
            self._state = self._placed(groups, blocks, state.drawn + 1)
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
        prompt = tuple(self.blocks[: -(-len(self._given) // self._size)])
        group = Group((Hypothesis(detokenizer=self._detokenizer),))
        count = self.options.num_beam_groups
        self._state = _State([group] * count, [prompt] * count)
        places = range(-(-self._longest // self._size))
        self._own = tuple(zip(*map(self._own_blocks, places), strict=True))
        self._cross = tuple(self.cross_blocks)
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
        running = self._state.groups[0].running
        blocks = self._state.blocks[0]
        fresh: tuple[int, ...] = ()
        if self._prefilled == self._reused:  # its first step
            fresh = (*blocks[self._shared :], *self._cross)
        whole = stop == len(self._given)
        return Row(
            token_ids=self._given[self._prefilled : stop],
            start=self._prefilled,
            blocks=blocks,
            prompt_length=len(self._given),
            cross_blocks=self._cross,
            cross_length=len(self.encoder_ids or ()),
            sample=self._sample(running[0]) if whole else None,
            beams=self._beams(running, None) if whole else None,
            fresh=fresh,
        )

    def _alike(self, step: int) -> SampleRow | None:
        """How all beams draw in a step; None if that depends on the tokens of each, or if the
        answer does not get that far."""
        return None if self.options.reads_tokens else self.options.ahead(step)

    def _sample(self, beam: Hypothesis) -> SampleRow:
        """How a beam draws where that depends on its tokens."""
        tokens = [*self._given, *beam.tokens]
        history = History(tokens, len(self._given), self.encoder_ids or ())
        return self.options.row(len(beam.tokens), history)

    def _beams(self, running: Sequence[Hypothesis], going: Going | None) -> Beams:
        return Beams(tuple([beam.score for beam in running]), self._keep, going, self._search)

    def _going(self, state: _State) -> Going | None:
        """See `Beams.going`."""
        options, running = self.options, state.groups[0].running
        if options.num_beam_groups > 1 or running[0].detokenizer is not None:
            return None
        if len(running) < self.width:  # a vocabulary that small: there will be more of them
            return None
        ahead = self._ahead
        return None if ahead is None else Going(options.end_token_ids, self._own, ahead)

    @property
    def _longest(self) -> int:
        """The most tokens of a beam that are in the cache."""
        return len(self._given) + self.options.max_new_tokens - 1

    def _own_blocks(self, place: int) -> list[int]:
        """Each row's own block for a place among its blocks: one for all rows where the prompt
        fills it, which they share."""
        shared, width = len(self._given) // self._size, self.width
        if place < shared:
            return self.blocks[place : place + 1] * width
        first = shared + (place - shared) * width
        return self.blocks[first : first + width]

    def _placed(self, groups: Sequence[Group], blocks: list[tuple[int, ...]], drawn: int) -> _State:
        """The next state, of `groups` whose running beams have inherited these `blocks`: each gets
        one of its own for the token that it adds, as `Going` says."""
        place = (len(self._given) + drawn - 1) // self._size
        if len(blocks[0]) == place:  # and so have all
            fresh = self._own_blocks(place)[: len(blocks)]
            placed = [(*own, new) for own, new in zip(blocks, fresh, strict=True)]
            return _State(groups, placed, drawn, fresh)
        copies: list[tuple[int, int]] = []
        last = {own[place]: i for i, own in enumerate(blocks)}
        if len(last) < len(blocks):
            unused = iter([block for block in self._own_blocks(place) if block not in last])
            for i, own in enumerate(blocks):
                if last[own[place]] != i:
                    copies.append((own[place], next(unused)))
                    blocks[i] = (*own[:place], copies[-1][1])
        return _State(groups, blocks, drawn, (), copies)

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
