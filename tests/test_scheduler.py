"""The scheduler's promises, over random arrivals, lengths, limits and cancellations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmi_multi.backends.base import Limits
from lmi_multi.engine.batch import Batch
from lmi_multi.engine.request import Share, tokens_of
from lmi_multi.engine.scheduler import Scheduler
from lmi_multi.engine.sequence import Sequence
from lmi_multi.resolved import Resolved

EOS = 2


def sequence(prompt: int, new: int, encoder: bool = False, **other: Any) -> Sequence:
    """`prompt` tokens in (the encoder's, if there is one), at most `new` out."""
    options = replace(Resolved(new, 0, False, 1.0, 0, 1.0, 0, False, (), (EOS,)), **other)
    ids = list(range(100, 100 + prompt))
    return Sequence(options, [0] if encoder else ids, ids if encoder else None)


def requests(shares: list[Share]) -> list[Sequence]:
    return [request for request, _ in shares if isinstance(request, Sequence)]


class Traffic(RuleBasedStateMachine):
    """Sequences come, run, end and are given up; no executor is needed to see who may run."""

    @initialize(
        encoder=st.booleans(),
        max_batch=st.integers(1, 5),
        max_step_tokens=st.integers(1, 12),
        max_idle_tokens=st.integers(0, 30),
        block_size=st.integers(1, 4),
        spare=st.integers(0, 25),
        begins_ahead=st.booleans(),
    )
    def start(
        self,
        encoder: bool,
        max_batch: int,
        max_step_tokens: int,
        max_idle_tokens: int,
        block_size: int,
        spare: int,
        begins_ahead: bool,
    ) -> None:
        self.encoder, self.longest = encoder, 20
        row = -(-self.longest // block_size)
        blocks = row * (2 if encoder else 1) + spare
        self.limits = Limits(
            *(max_batch, self.longest, max_step_tokens, blocks, block_size, max_idle_tokens),
            begins_ahead=begins_ahead,
        )
        self.scheduler = Scheduler(self.limits)
        self.alive: list[Sequence] = []
        self.queue: list[Sequence] = []  # not admitted yet, in order of arrival
        self.committed: set[Sequence] = set()
        self.steps = self.work = 0

    @rule(prompt=st.integers(1, 20), new=st.integers(1, 20))
    def add(self, prompt: int, new: int) -> None:
        new = min(new, self.longest - (1 if self.encoder else prompt))
        if new < 1:
            return
        added = sequence(prompt, new, self.encoder)
        self.scheduler.add(added)
        self.alive.append(added)
        self.queue.append(added)
        self.work += prompt + new + 1

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(self.alive)))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), again=st.booleans())
    def step(self, data: st.DataObject, again: bool) -> None:
        running = [own for own in self.scheduler.running if own not in self.queue]
        most = self.most_tokens(running)
        batch, shares = self.scheduler.plan()
        sequences = requests(shares)
        note(f"{batch}")
        self.check_limits(batch, most)
        self.check_rows(batch, sequences)
        self.check_admission(running, batch)
        if again:  # the executor failed: what was planned is planned once more
            return
        for row, own in zip(batch.rows, sequences, strict=True):
            if row.sample is not None:
                own.push(data.draw(st.sampled_from([5, 5, 5, EOS])))
        self.scheduler.commit(shares)
        self.committed |= set(sequences)
        self.queue = [own for own in self.queue if own not in self.scheduler.running]
        for own in sequences:
            if own.finish_reason is not None:
                assert own not in self.scheduler.running
                self.end(own)

    def end(self, own: Sequence) -> None:
        self.scheduler.release(own)
        assert not own.blocks and not own.cross_blocks
        self.alive.remove(own)
        if own in self.queue:
            self.queue.remove(own)

    def most_tokens(self, running: list[Any]) -> int:
        """Only where all that run are prompts still may a step take long."""
        if any(own.computed + 1 == len(own.tokens) for own in running):
            return self.limits.max_step_tokens
        return max(self.limits.max_step_tokens, self.limits.max_idle_tokens)

    def check_limits(self, batch: Batch, most: int) -> None:
        assert batch.rows, "a step that does nothing would be repeated for ever"
        assert len(self.scheduler.running) <= self.limits.max_batch
        counts = [len(row.token_ids) for row in batch.rows]
        assert any(counts) and counts == sorted(counts, key=lambda n: n > 1)
        encoded = sum(len(prompt.token_ids) for prompt in batch.prompts)
        assert sum(counts) <= most
        assert encoded <= most or len(batch.prompts) == 1

    def check_rows(self, batch: Batch, sequences: list[Sequence]) -> None:
        for row, own in zip(batch.rows, sequences, strict=True):
            # Slices follow each other without gap, and the last one draws.
            assert row.start == own.computed
            assert bool(row.fresh) == (own not in self.committed)
            if not row.token_ids:  # a newcomer's, whose one token is for the step that is begun
                assert self.limits.begins_ahead and row.fresh
                assert [row.next_token] == own.tokens and row.ahead is not None
            assert list(row.token_ids) == own.tokens[row.start : row.length]
            assert (row.sample is not None) == (row.length == len(own.tokens))
            assert row.sample is None or row.sample.step == len(own.generated)
            assert len(row.blocks) * self.limits.block_size >= row.length
            assert len(row.cross_blocks) * self.limits.block_size >= row.cross_length
            assert row.cross_length == (len(own.encoder_ids or ()))
            if own.encoder_ids:
                mine = [p for p in batch.prompts if p.cross_blocks == row.cross_blocks]
                assert len(mine) == (own not in self.committed)
                assert all(prompt.token_ids == own.encoder_ids for prompt in mine)

    def check_admission(self, running: list[Sequence], batch: Batch) -> None:
        now = self.scheduler.running
        assert now[: len(running)] == running, "nothing that runs is thrown out"
        newcomers = now[len(running) :]
        assert newcomers == self.queue[: len(newcomers)], "first come, first served"
        if self.encoder and newcomers:
            assert len(batch.prompts) >= 1

    @invariant()
    def every_block_has_one_owner(self) -> None:
        if not hasattr(self, "alive"):
            return
        blocks = [b for own in self.alive for b in own.blocks + own.cross_blocks]
        assert len(set(blocks)) == len(blocks)
        assert self.scheduler.cache.free == self.limits.blocks - len(blocks)
        assert self.scheduler.idle == (not self.alive)

    def teardown(self) -> None:
        """Whatever is left finishes, in no more steps than there is work, and frees all."""
        if not hasattr(self, "alive"):
            return
        for _ in range(self.work):
            if self.scheduler.idle:
                break
            running = [own for own in self.scheduler.running if own not in self.queue]
            most = self.most_tokens(running)
            batch, shares = self.scheduler.plan()
            self.check_limits(batch, most)
            for row, own in zip(batch.rows, requests(shares), strict=True):
                if row.sample is not None:
                    own.push(5)
            self.scheduler.commit(shares)
        assert self.scheduler.idle
        assert self.scheduler.cache.free == self.limits.blocks
        assert all(own.finish_reason in ("length", "eos") for own in self.alive)
        assert all(own.computed == len(own.tokens) - 1 for own in self.alive)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=80,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

LIMITS = Limits(max_batch=4, max_tokens=64, max_step_tokens=8, blocks=32, block_size=4)


def test_a_long_prompt_is_prefilled_beside_what_runs() -> None:
    scheduler = Scheduler(LIMITS)
    short, long = sequence(2, 10), sequence(17, 2)
    scheduler.add(short)
    scheduler.add(long)
    parts = []
    while long.computed < 17:
        batch, shares = scheduler.plan()
        sequences = requests(shares)
        planned = zip(batch.rows, sequences, strict=True)
        parts.append([(own is long, len(row.token_ids)) for row, own in planned])
        for row, own in zip(batch.rows, sequences, strict=True):
            if row.sample:
                own.push(5)
        scheduler.commit(shares)
    assert parts == [
        [(False, 2), (True, 6)],
        [(False, 1), (True, 7)],
        [(False, 1), (True, 4)],
    ]


@pytest.mark.parametrize("idle", [0, 9])
def test_an_encoder_prompt_beyond_the_step_is_the_only_one_of_its_step(idle: int) -> None:
    """Beside what runs, which would wait for it all the same."""
    scheduler = Scheduler(replace(LIMITS, max_idle_tokens=idle))
    for length in (8, 9, 10, 2):
        scheduler.add(sequence(length, 5, encoder=True))
    tokens = []
    for _ in range(4):
        batch, shares = scheduler.plan()
        sequences = requests(shares)
        tokens.append([len(prompt.token_ids) for prompt in batch.prompts] + [len(batch.rows)])
        for own in sequences:
            own.push(5)
        scheduler.commit(shares)
    assert tokens == [[8, 1], [9, 2], [10, 3], [2, 4]]


@pytest.mark.parametrize("begins_ahead", [True, False])
def test_a_newcomers_first_token_is_drawn_among_those_that_run(begins_ahead: bool) -> None:
    """Not in the step that ends its prefill, where the host begins steps ahead; nor alone."""
    scheduler = Scheduler(replace(LIMITS, begins_ahead=begins_ahead))
    found = []
    for number in range(6):
        if number in (0, 2):
            scheduler.add(sequence(12, 9))
        batch, shares = scheduler.plan()
        found.append([(len(row.token_ids), row.sample is not None) for row in batch.rows])
        for row, own in zip(batch.rows, requests(shares), strict=True):
            if row.sample is not None:
                own.push(5)
            left = own.tokens[row.length : row.length + 1] if row.sample is None else []
            last = len(own.tokens) - row.length == 1
            assert [row.next_token] == (left if left and last else [None])
            assert row.sample is not None or (row.ahead is not None) == bool(left and last)
        scheduler.commit(shares)
    one, alone = (1, True), [[(8, False)], [(4, True)]]
    if begins_ahead:
        assert found == [*alone, [one, (7, False)], [one, (4, False)], [one, one], [one, one]]
    else:
        assert found == [*alone, [one, (7, False)], [one, (5, True)], [one, one], [one, one]]


@pytest.mark.parametrize("encoder", [True, False])
def test_a_newcomers_only_token_is_drawn_among_those_that_run(encoder: bool) -> None:
    """An encoder-decoder's start token, and a prompt of one: what comes before, its encoder and its
    blocks, is of the step that it comes in, and once alone."""
    scheduler = Scheduler(replace(LIMITS, begins_ahead=True))
    found = []
    for number in range(4):
        if number < 2:
            scheduler.add(sequence(1, 9, encoder))
        batch, shares = scheduler.plan()
        found.append([(len(row.token_ids), bool(row.fresh)) for row in batch.rows])
        assert len(batch.prompts) == (encoder and number < 2)
        for row, own in zip(batch.rows, requests(shares), strict=True):
            if row.sample is not None:
                own.push(5)
        scheduler.commit(shares)
    assert found == [[(1, True)], [(1, False), (0, True)], [(1, False)] * 2, [(1, False)] * 2]


@pytest.mark.parametrize(
    ("runs", "comes"), [({"logprobs": 1}, {}), ({}, {"repetition_penalty": 1.5}), ({}, {})]
)
@pytest.mark.parametrize("encoder", [True, False])
def test_tokens_are_left_where_it_spares_a_wait(
    runs: dict[str, Any], comes: dict[str, Any], encoder: bool
) -> None:
    """Not to a step that waits anyway. What is left counts as a token: where a step does not fit,
    the latest of those who want most gives up."""
    scheduler = Scheduler(replace(LIMITS, begins_ahead=True))
    for other in (runs, comes):
        scheduler.add(sequence(1, 9, encoder, **other))
        batch, shares = scheduler.plan()
        assert all(map(tokens_of, shares))
        for row, own in zip(batch.rows, requests(shares), strict=True):
            if row.sample is not None:
                own.push(5)
        scheduler.commit(shares)
    assert [len(row.token_ids) for row in batch.rows] == [1, int(bool(runs or comes))]


def test_who_follows_lets_no_options_wait() -> None:
    """An executor that knows the tokens that it has drawn begins all rows' steps ahead."""
    scheduler = Scheduler(replace(LIMITS, begins_ahead=True, follows=True))
    for options in ({"logprobs": 1}, {"repetition_penalty": 1.5}):
        scheduler.add(sequence(3, 9, **options))
        batch, shares = scheduler.plan()
        for row, own in zip(batch.rows, requests(shares), strict=True):
            if row.sample is not None:
                own.push(5)
        scheduler.commit(shares)
    assert [(len(row.token_ids), row.sample is not None) for row in batch.rows] == [
        (1, True),
        (2, False),
    ]


def test_the_token_that_is_left_of_a_prompt_is_nobody_elses() -> None:
    """A prompt that fills the step beside what runs: no slice of one token for the one behind."""
    scheduler = Scheduler(replace(LIMITS, begins_ahead=True))
    found = []
    for number in range(4):
        for length in ((2,), (7, 7), (), ())[number]:
            scheduler.add(sequence(length, 9))
        batch, shares = scheduler.plan()
        found.append([len(row.token_ids) for row in batch.rows])
        for row, own in zip(batch.rows, requests(shares), strict=True):
            if row.sample is not None:
                own.push(5)
        scheduler.commit(shares)
    assert found == [[2], [1, 6], [1, 1, 6], [1, 1, 1]]


def test_newcomers_among_themselves_leave_nothing() -> None:
    scheduler = Scheduler(replace(LIMITS, begins_ahead=True))
    for length in (1, 5):
        scheduler.add(sequence(length, 9))
    batch, _ = scheduler.plan()
    assert [(len(row.token_ids), row.sample is not None) for row in batch.rows] == [
        (1, True),
        (5, True),
    ]


def test_no_prompt_is_encoded_without_a_row() -> None:
    """Where more rows may run than a step has tokens."""
    scheduler = Scheduler(Limits(6, 20, 3, blocks=200, block_size=4))
    for length in (3, 2, 3, 1, 2, 3):
        scheduler.add(sequence(length, 4, encoder=True))
    for _ in range(30):
        batch, shares = scheduler.plan()
        owners = {row.cross_blocks for row in batch.rows}
        assert all(prompt.cross_blocks in owners for prompt in batch.prompts)
        for own in requests(shares):
            own.push(5)
        scheduler.commit(shares)
        if scheduler.idle:
            return
    raise AssertionError("they have not ended")


def test_an_encoders_tokens_are_not_those_of_rows() -> None:
    """Prompts that fill the encoder's share are one step, with their first rows."""
    scheduler = Scheduler(LIMITS)
    for length in (3, 5, 8, 2):
        scheduler.add(sequence(length, 9, encoder=True))
    found = []
    for _ in range(3):
        batch, shares = scheduler.plan()
        found.append(([len(prompt.token_ids) for prompt in batch.prompts], len(batch.rows)))
        for own in requests(shares):
            own.push(5)
        scheduler.commit(shares)
    assert found == [([3, 5], 2), ([8], 3), ([2], 4)]


def test_what_runs_is_in_every_step_however_long_newcomers_prompts_are() -> None:
    scheduler = Scheduler(LIMITS)
    running = sequence(2, 9, encoder=True)
    scheduler.add(running)
    tokens = []
    for number in range(7):
        if number == 1:
            for _ in range(3):
                scheduler.add(sequence(9, 9, encoder=True))
        batch, shares = scheduler.plan()
        sequences = requests(shares)
        tokens.append(([len(prompt.token_ids) for prompt in batch.prompts], running in sequences))
        for own in sequences:
            own.push(5)
        scheduler.commit(shares)
    assert tokens == [([2], True), *[([9], True)] * 3, *[([], True)] * 3]


def test_what_can_never_fit_is_refused() -> None:
    scheduler = Scheduler(Limits(4, 64, 8, blocks=2, block_size=4))
    scheduler.add(sequence(7, 2))  # the token drawn last needs no place
    with pytest.raises(ValueError, match="needs 3 blocks, the cache has 2"):
        scheduler.add(sequence(7, 3))


def test_a_finished_sequence_is_not_planned_again() -> None:
    """As when an interrupt arrives between a token and its commit."""
    scheduler = Scheduler(LIMITS)
    done, other = sequence(2, 1), sequence(2, 2)
    scheduler.add(done)
    scheduler.add(other)
    scheduler.plan()
    done.push(5)
    _, shares = scheduler.plan()
    assert requests(shares) == [other] and not done.blocks
