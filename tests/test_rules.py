"""The rules by which rows draw: what they come to in a step, and which rows are alike."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lmi_multi.defaults import GenerationDefaults
from lmi_multi.engine import sequence
from lmi_multi.engine.batch import Continuation, Continuations
from lmi_multi.engine.beams import BeamSearch
from lmi_multi.ops.bans import ngram_bans, word_bans
from lmi_multi.ops.processors import Edit, Edits
from lmi_multi.ops.rules import History, Rules
from lmi_multi.ops.sampling import SampleRow, Sampling, sample
from lmi_multi.options import GenerateOptions
from lmi_multi.resolved import Resolved

VOCAB = 13
NEW = 6
PROMPT, DRAWN, LATER = [5, 6, 5], [7, 8, 7], [9, 5, 9]
LONGER = History([*PROMPT, *DRAWN, *LATER], 3)  # than step 3 looks at


def resolved(**options: Any) -> Resolved:
    defaults = GenerationDefaults(eos_token_ids=(2,), decoder_start_token_id=0)
    return defaults.resolve(
        GenerateOptions(**{"max_new_tokens": NEW, **options}),
        prompt_tokens=3,
        decoder_only=False,
        limit=64,
        vocab=VOCAB,
    )


# --- what they come to

EDITS: list[tuple[Rules, Edit | None]] = [
    (Rules(bias=((3, 1.5),)), Edit(bias=((3, 1.5),))),
    (Rules(repetition_penalty=1.5), Edit(seen=(5, 6, 7, 8), repetition_penalty=1.5)),
    (Rules(presence_penalty=0.5), Edit(counted=((7, -0.5), (8, -0.5)))),
    (Rules(frequency_penalty=0.25), Edit(counted=((7, -0.5), (8, -0.25)))),
    (
        Rules(encoder_repetition_penalty=2.0),
        Edit(prompt=(5, 6), encoder_repetition_penalty=2.0),
    ),
    (
        Rules(bias=((3, 1.5),), presence_penalty=-1.0, repetition_penalty=0.5),
        Edit(
            bias=((3, 1.5),),
            seen=(5, 6, 7, 8),
            repetition_penalty=0.5,
            counted=((7, 1.0), (8, 1.0)),
        ),
    ),
    (Rules(no_repeat_ngram_size=2, bad_words=((7, 1),)), None),
]


@pytest.mark.parametrize(("rules", "expected"), EDITS)
def test_edits_are_of_the_tokens_before_the_step(rules: Rules, expected: Edit | None) -> None:
    assert rules.edit(LONGER, 3) == expected
    assert rules.edit(History([*PROMPT, *DRAWN], 3), 3) == expected


def test_an_encoded_prompt_takes_the_place_of_the_given_tokens() -> None:
    edit = Rules(encoder_repetition_penalty=2.0).edit(History([0, 7], 1, [4, 4, 3]), 1)
    assert edit == Edit(prompt=(4, 3), encoder_repetition_penalty=2.0)


def test_nothing_is_counted_before_the_first_draw() -> None:
    assert Rules(presence_penalty=1.0, frequency_penalty=1.0).edit(LONGER, 0) is None


@pytest.mark.parametrize(
    ("rules", "step", "expected"),
    [
        (Rules(no_repeat_ngram_size=1), 3, (5, 6, 7, 8)),
        (Rules(no_repeat_ngram_size=2), 0, (6,)),
        (Rules(no_repeat_ngram_size=2), 1, ()),
        (Rules(no_repeat_ngram_size=2), 3, (8,)),
        (Rules(no_repeat_ngram_size=2), 5, (6, 7)),
        (Rules(bad_words=((1,), (7, 4), (8, 7, 3), (5, 9))), 3, (1, 4, 3)),
        (Rules(bad_words=((8,), (7, 3)), no_repeat_ngram_size=2), 3, (8, 3)),
        (Rules(repetition_penalty=1.5, bias=((3, 1.0),)), 3, ()),
    ],
)
def test_bans_are_of_the_tokens_before_the_step(
    rules: Rules, step: int, expected: tuple[int, ...]
) -> None:
    assert rules.bans(LONGER, step) == expected


def test_whether_they_read_tokens() -> None:
    assert not Rules().reads_tokens and not Rules(bias=((1, 2.0),)).reads_tokens
    for rules, _ in EDITS[1:]:
        assert rules.reads_tokens


def test_tokens_that_are_not_there_are_not_guessed() -> None:
    rules = Rules(repetition_penalty=1.5, no_repeat_ngram_size=2)
    for find in (rules.edit, rules.bans):
        with pytest.raises(ValueError, match="depends on 10 tokens, there are 9"):
            find(LONGER, 7)
        with pytest.raises(ValueError, match="there is no history"):
            find(None, 0)
    with pytest.raises(ValueError, match="there is no history"):
        Sampling.of([SampleRow(rules=rules)])


# --- rows


def test_a_row_follows_its_rules_unless_it_is_forced() -> None:
    rules = Rules(bad_words=((1,), (7, 4)), repetition_penalty=2.0)
    row = SampleRow(step=3, banned=(4, 9), rules=rules, history=LONGER)
    assert row.bans == (4, 9, 1) and row.edit == rules.edit(LONGER, 3)
    forced = row._replace(forced=(8, 2))
    assert forced.bans == (4, 9) and forced.edit == Edit(forced=(8, 2))
    assert SampleRow().bans == () and SampleRow().edit is None


def test_the_same_row_may_have_another_history() -> None:
    row = SampleRow(0.5, seed=3, rules=Rules(repetition_penalty=2.0), history=LONGER)
    assert row.history is LONGER and row._fields[-1] == "history"
    for other in (row, row._replace(history=None), row._replace(history=History([], 0))):
        assert row.same(other) and other.same(row)
    for change in ({"step": 1}, {"forced": (3,)}, {"rules": None}, {"banned": (1,)}, {"seed": 4}):
        assert not row.same(row._replace(**change))


def test_what_continues_a_row_with_rules() -> None:
    row = SampleRow(0.5, seed=3, step=6, rules=Rules(bad_words=((3,),)), history=LONGER)
    later = row.at(7, 0)
    assert later.history is LONGER and later.continues(row)
    other = History([1], 1)
    assert row.at(7, 0, other).history is other and row.at(7, 0, other).continues(row)
    for change in ({"rules": None}, {"forced": (3,)}, {"rules": Rules(bad_words=((4,),))}):
        assert not later._replace(**change).continues(row)
    forced = row._replace(forced=(3,))
    assert forced.at(7, 0).continues(forced) and not forced.at(8, 0).continues(forced)


def test_rows_cross_to_other_processes() -> None:
    row = resolved(repetition_penalty=1.5).row(3, LONGER)
    other = pickle.loads(pickle.dumps(row))
    assert other == row and other.same(row) and other.edit == row.edit


# --- what options make of them


def test_rules_are_made_once() -> None:
    own = resolved(repetition_penalty=1.5)
    assert own.row(0, LONGER).rules is own.row(1, LONGER).rules is own.rules
    assert resolved(suppress_tokens=[1], min_new_tokens=2, do_sample=True).rules is None


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"min_new_tokens": 2}, {"logit_bias": {3: 1.0}}]
)
def test_rows_that_read_no_tokens_have_no_history(options: dict[str, Any]) -> None:
    own = resolved(**options)
    assert not own.reads_tokens
    assert all(own.row(step, LONGER).history is None for step in range(NEW))


def test_plain_rows_are_shared() -> None:
    row = resolved().row(1, LONGER)
    assert row is resolved().row(1) and row is resolved(seed=4).ahead(1, History([1], 1))


def test_a_beginning_is_forced_where_one_token_was_given() -> None:
    own = resolved(forced_bos_token_id=4, suppress_tokens=[7], min_new_tokens=2)
    alone, more = History([0], 1), History([0, 1], 2)
    assert own.reads_tokens
    assert [own.row(step, alone).forced for step in range(3)] == [(4,), (), ()]
    assert own.row(0, alone).banned == (7,) and own.row(1, alone).banned == (7, 2)
    assert own.row(0, more).forced == ()


def test_an_end_is_forced_in_the_last_step() -> None:
    own = resolved(forced_eos_token_id=[2, 4], suppress_tokens=[7], min_new_tokens=NEW)
    assert not own.reads_tokens
    rows = [own.row(step) for step in range(NEW)]
    assert [row.forced for row in rows] == [()] * (NEW - 1) + [(2, 4)]
    assert [row.banned for row in rows] == [(7, 2)] * (NEW - 1) + [(7,)]
    one = resolved(forced_eos_token_id=2, forced_bos_token_id=4, max_new_tokens=1)
    assert one.row(0, History([0], 1)).forced == (2,)


CHOICES: dict[str, Any] = {
    "repetition_penalty": 1.5,
    "encoder_repetition_penalty": 0.5,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.25,
    "no_repeat_ngram_size": 2,
    "bad_words": [[4], [3, 5], [6, 6, 1]],
    "suppress_tokens": [1, 10],
    "logit_bias": {3: 2.0, 12: -9.5},
    "forced_bos_token_id": 6,
    "forced_eos_token_id": [2, 7],
    "min_new_tokens": 4,
    "logprobs": 2,
    "temperature": 0.7,
}
COMBINATIONS = [{}, CHOICES] + [
    dict(chosen) for count in (1, 2) for chosen in itertools.combinations(CHOICES.items(), count)
]


def names(options: dict[str, Any]) -> str:
    return "+".join(options) if len(options) < len(CHOICES) else "all"


@pytest.mark.parametrize("options", COMBINATIONS, ids=names)
def test_a_row_is_known_ahead(options: dict[str, Any]) -> None:
    own = resolved(**options, do_sample=True, seed=5)
    tokens = [0]
    kept = History(tokens, 1, [7, 8, 9])
    for step in range(NEW):
        found = [own.ahead(later, kept, 3) for later in range(step, NEW + 2)]
        assert found == [own.row(later, kept, 3) for later in range(step, NEW)] + [None, None]
        row = own.row(step, History([*tokens], 1, [7, 8, 9]), 3)
        tokens += [6, 3]  # more than it looks at
        assert found[0] is not None and found[0].same(row)
        assert (found[0].edit, found[0].bans) == (row.edit, row.bans)
        tokens.pop()


def expected_logits(
    logits: Tensor, own: Resolved, step: int, tokens: list[int], encoded: Sequence[int]
) -> Tensor:
    """By an edit that is told what to do, and bans written in."""
    given, banned = len(tokens) - step, set(own.suppress_tokens)
    forced: tuple[int, ...] = ()
    if own.forced_bos_token_id is not None and len(tokens) == 1:
        forced = (own.forced_bos_token_id,)
    if own.forced_eos_token_ids and step == NEW - 1:
        forced = own.forced_eos_token_ids
    if not forced:
        size = own.no_repeat_ngram_size
        banned |= {*(ngram_bans(tokens, size) if size else ()), *word_bans(tokens, own.bad_words)}
        banned |= set(own.end_token_ids) if step < own.min_new_tokens else set()
    counts = Counter(tokens[given:]).items()
    edit = Edit(
        bias=own.logit_bias,
        prompt=tuple(set(encoded)),
        encoder_repetition_penalty=own.encoder_repetition_penalty,
        seen=tuple(set(tokens)),
        repetition_penalty=own.repetition_penalty,
        counted=tuple(
            (t, -own.presence_penalty - own.frequency_penalty * count) for t, count in counts
        ),
        forced=forced,
    )
    edits = Edits.of([edit])
    assert edits is not None
    logits = edits.apply(logits)
    logits[:, list(banned)] = float("-inf")
    return logits


@pytest.mark.parametrize("options", COMBINATIONS, ids=names)
def test_draws_are_those_of_direct_edits(options: dict[str, Any]) -> None:
    """By rows that are made before their tokens are there, from a list that grows."""
    own = resolved(**options, do_sample=True, seed=5)
    encoded, tokens = [7, 8, 7], [0]
    rows = [own.row(step, History(tokens, 1, encoded), 3) for step in range(NEW)]
    for step, row in enumerate(rows):
        logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(step)) * 4
        before = expected_logits(logits, own, step, tokens, encoded)
        plain = row._replace(rules=None, forced=(), banned=(), history=None)
        drawn, wanted = (
            sample(given, Sampling.of([r])) for given, r in ((logits, row), (before, plain))
        )
        assert drawn.tokens == wanted.tokens and drawn.finite == wanted.finite
        tokens.append(int(drawn.tokens))


# --- requests


def test_the_rows_of_a_sequence_read_its_own_list() -> None:
    own = sequence.Sequence(resolved(repetition_penalty=1.5), [0], [7, 8, 9])
    [row] = own.rows(1)
    assert row.sample is not None and row.ahead is not None
    assert row.sample.history is row.ahead.history
    assert row.sample.history is not None and row.sample.history.tokens is own.tokens
    assert row.sample.history[1:] == (1, [7, 8, 9])
    ahead = row.ahead
    own.push(4)
    own.advance(1)
    [row] = own.rows(1)
    assert row.sample is ahead
    assert ahead.edit == Edit(seen=(0, 4), repetition_penalty=1.5)


def test_the_last_row_of_a_sequence_has_no_next_one() -> None:
    own = sequence.Sequence(resolved(repetition_penalty=1.5, max_new_tokens=1), [0], [7])
    assert own.rows(1)[0].ahead is None


@pytest.mark.parametrize(
    ("options", "follows", "goes"),
    [
        ({}, False, True),
        ({"repetition_penalty": 1.5}, False, False),
        ({"repetition_penalty": 1.5}, True, True),
        ({"logprobs": 1, "forced_bos_token_id": 4}, True, True),
        ({"logit_bias": {3: 1.0}}, False, False),
    ],
)
def test_who_goes_ahead(options: dict[str, Any], follows: bool, goes: bool) -> None:
    own = resolved(**options)
    assert sequence.Sequence(own, [0], [7]).goes_ahead(follows) == goes
    search = BeamSearch(resolved(**options, num_beams=2), [0], [], 4, [7])
    assert search.goes_ahead(follows) == own.goes_ahead


@pytest.mark.parametrize(
    ("options", "reads", "forces"),
    [
        ({}, False, False),
        ({"logit_bias": {3: 1.0}}, False, False),
        ({"forced_bos_token_id": 4}, True, True),
        ({"no_repeat_ngram_size": 2}, True, False),
    ],
)
def test_beams_share_a_sample_unless_it_reads_their_tokens(
    options: dict[str, Any], reads: bool, forces: bool
) -> None:
    search = BeamSearch(resolved(**options, num_beams=2), [0], [], 4, [7])
    search.blocks, search.cross_blocks = list(range(6)), [6]
    search.start(0, 0)
    [row] = search.rows(1)
    assert row.sample is not None and row.sample.forced == ((4,) if forces else ())
    search.accept(iter([Continuations([Continuation(0, 5, -1.0), Continuation(0, 6, -2.0)])]))
    rows = search.rows(1)
    assert rows[0].beams is not None and (rows[0].beams.going is None) == reads
    samples = [row.sample for row in rows if row.sample is not None]
    assert len(samples) == 2 and (samples[0] is samples[1]) == (not reads)
    wanted = [History([0, 5], 1, [7]), History([0, 6], 1, [7])]
    assert [s.history for s in samples] == (
        wanted if "no_repeat_ngram_size" in options else [None] * 2
    )
