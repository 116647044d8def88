"""Where beams keep their keys and values: a model of the cache that holds tokens instead."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmi_multi.backends.base import Limits
from lmi_multi.engine.batch import Batch, Continuation, Continuations, Draw, Row
from lmi_multi.engine.beams import BeamSearch
from lmi_multi.engine.request import Request
from lmi_multi.engine.scheduler import Scheduler
from lmi_multi.engine.sequence import Sequence
from lmi_multi.models.spec import Learned, ModelSpec
from lmi_multi.ops import paged
from lmi_multi.ops.heads import Heads
from lmi_multi.resolved import Resolved

EOS = 2


def search(ids: list[int], new: int, beams: int, groups: int, size: int) -> BeamSearch:
    options = Resolved(
        *(new, 0, False, 1.0, 0, 1.0, 0, False, (), (EOS,)),
        num_beams=beams,
        num_beam_groups=groups,
        num_return_sequences=beams,
        diversity_penalty=float(groups > 1),
    )
    answers = [Sequence(options, list(ids), stream=i) for i in range(beams)]
    return BeamSearch(options, ids, answers, size)


def plain(ids: list[int], new: int) -> Sequence:
    options = Resolved(new, 0, False, 1.0, 0, 1.0, 0, False, (), (EOS,))
    return Sequence(options, list(ids))


class Cache:
    """Blocks of tokens; a step reads every row back and compares it with what it should be."""

    def __init__(self, limits: Limits) -> None:
        self.size = limits.block_size
        self.blocks: list[list[int | None]] = [
            [-1] * limits.block_size for _ in range(limits.blocks)
        ]

    def step(self, batch: Batch) -> None:
        for row in batch.rows:
            for block in row.fresh:
                self.blocks[block] = [None] * self.size
        for row in batch.rows:
            for source, target in row.copies:
                self.blocks[target] = list(self.blocks[source])
        written: set[tuple[int, int]] = set()
        for row in batch.rows:
            for place, token in zip(range(row.start, row.length), row.token_ids, strict=True):
                at = (row.blocks[place // self.size], place % self.size)
                assert at not in written, "two rows write to one place"
                written.add(at)
                self.blocks[at[0]][at[1]] = token

    def read(self, blocks: tuple[int, ...], length: int) -> list[int | None]:
        return list(itertools.chain(*(self.blocks[block] for block in blocks)))[:length]


def known(request: Request) -> list[list[int]]:
    """The tokens of each of its rows."""
    if isinstance(request, Sequence):
        return [request.tokens]
    assert isinstance(request, BeamSearch)
    state = request._state
    beams = [beam for group in state.groups for beam in group.running]
    return [[*request._given, *beam.tokens] for beam in beams[: None if state.drawn else 1]]


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), prefix_caching=st.booleans())
def test_every_row_reads_its_own_tokens(seed: int, prefix_caching: bool) -> None:
    random = Random(seed)
    size = random.randint(1, 4)
    limits = Limits(max_batch=8, max_tokens=24, max_step_tokens=9, blocks=160, block_size=size)
    if random.random() < 0.5:  # no more than one search needs
        limits = replace(limits, blocks=5 * -(-24 // size))
    scheduler, cache = Scheduler(limits, prefix_caching), Cache(limits)
    requests: list[Request] = []
    for _ in range(random.randint(1, 6)):
        prompt = prompt_of(random)
        new = random.randint(1, 12)
        groups, width = random.choice([(1, 2), (1, 5), (2, 2), (3, 1), (0, 1)])
        made = search(prompt, new, groups * width, groups, size) if groups else plain(prompt, new)
        requests.append(made)
    late = requests[2:]
    for made in requests[:2]:
        scheduler.add(made)
    while late or not scheduler.idle:
        if late and (scheduler.idle or random.random() < 0.3):
            scheduler.add(late.pop())
        batch, shares = scheduler.plan()
        assert sum(len(row.token_ids) for row in batch.rows) <= limits.max_step_tokens
        assert len(batch.rows) <= limits.max_batch
        cache.step(batch)
        for request, rows in shares:
            check(request, rows, cache)
        if random.random() < 0.1:
            continue  # the executor failed: what was planned is planned once more
        for request, rows in shares:
            if rows[0].sample is not None:
                request.accept(iter(draws(random, rows)))
        if random.random() < 0.1:
            continue  # interrupted before the commit
        scheduler.commit(shares)
        if len(requests) > 2 and requests[-1] not in late and random.random() < 0.05:
            given_up = requests.pop()
            given_up.cancel()
            scheduler.release(given_up)
    assert scheduler.cache.free == limits.blocks
    for request in requests:
        assert request.finish_reason in ("eos", "length")
        assert not request.blocks


def prompt_of(random: Random) -> list[int]:
    """One of few beginnings, and an end."""
    start, stop = random.randint(0, 2), random.randint(1, 12)
    same = list(range(1000 * start, 1000 * start + stop))[: random.randint(1, 12)]
    return same + [random.randint(20, 21) for _ in range(stop - len(same))]


def check(request: Request, rows: Collection[Row], cache: Cache) -> None:
    """Whether the rows of a request read what they should after a step."""
    tokens = known(request)
    assert len(tokens) == len(rows)
    for row, own in zip(rows, tokens, strict=True):
        assert cache.read(tuple(row.blocks), row.length) == own[: row.length]
        assert (row.sample is not None) == (row.length == len(own))


def draws(random: Random, rows: Iterable[Row]) -> list[Draw | Continuations]:
    """What one request might get; scores fall, as they must."""
    results: list[Draw | Continuations] = []
    for row in rows:
        if row.beams is not None:
            pairs = [(b, t) for b in range(len(row.beams.scores)) for t in (5, 6, 7, 8, 9, EOS)]
            random.shuffle(pairs)
            chosen = pairs[: row.beams.keep]
            best = [Continuation(b, t, -float(i)) for i, (b, t) in enumerate(chosen)]
            results.append(Continuations(best))
    return results or [Draw(random.choice([5, 6, 7, EOS]))]


@pytest.mark.parametrize("most", [1, 10_000])
def test_blocks_are_copied_in_every_layer(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """And no others are touched, whether all are copied at once or one after the other."""
    monkeypatch.setattr(paged, "COPIED_BYTES", most)
    spec = ModelSpec(
        family="test", vocab=8, hidden=8, heads=2, ffn=8, position=Learned(), decoder_layers=3
    )
    cache = paged.PagedCache(Heads(spec, 1), 9, 2, torch.float32, torch.device("cpu"))
    for pool in (*cache.k, *cache.v):
        pool.normal_()
    before = [pool.clone() for pool in (*cache.k, *cache.v)]
    cache.copy([(1, 4), (1, 5), (8, 0)])
    cache.clear([2, 7])
    for pool, old in zip((*cache.k, *cache.v), before, strict=True):
        expected = old[[8, 1, 2, 3, 1, 1, 6, 7, 8]]
        expected[[2, 7]] = 0
        assert torch.equal(pool, expected)
