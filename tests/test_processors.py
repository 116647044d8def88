"""Edits and bans against Hugging Face's processors, one by one and in Hugging Face's own order."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.logits_process import (
    EncoderRepetitionPenaltyLogitsProcessor,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from lmi_multi.defaults import GenerationDefaults
from lmi_multi.ops import sampling
from lmi_multi.ops.bans import ngram_bans, word_bans
from lmi_multi.ops.logprobs import Wanted
from lmi_multi.ops.processors import Edit, Edits
from lmi_multi.ops.rules import History
from lmi_multi.ops.sampling import SampleRow, Sampling, sample
from lmi_multi.options import GenerateOptions
from lmi_multi.resolved import Resolved
from tests.families import FAMILIES

VOCAB = 13  # small, so that histories repeat themselves
EOS = 2
NEW = 6
INF = float("inf")


def resolved(decoder_only: bool = True, prompt: int = 3, **options: Any) -> Resolved:
    return GenerationDefaults(eos_token_ids=(EOS,)).resolve(
        GenerateOptions(max_new_tokens=NEW, **options),
        prompt_tokens=prompt,
        decoder_only=decoder_only,
        limit=0,
        vocab=VOCAB,
    )


def row_of(
    own: Resolved, step: int, tokens: Sequence[int], encoded: Sequence[int] = ()
) -> SampleRow:
    """The row whose `tokens` are all that it has, `step` generated ones at their end."""
    return own.row(step, History(tokens, len(tokens) - step, encoded))


def processed(logits: Tensor, *rows: SampleRow) -> Tensor:
    """Logits [rows, vocab] after edits and bans, as `sample` applies them."""
    found = Sampling.of(rows)
    if found.edits is not None:
        logits = found.edits.apply(logits)
    return sampling._ban(logits, found.banned) if found.any_banned else logits


def random_logits(rows: int, seed: int, vocab: int = VOCAB) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 4


def histories(seed: int, prompt: int, count: int = 60) -> list[list[int]]:
    """Random tokens; `prompt` of them are given, up to 5 more generated."""
    draw = random.Random(seed)
    return [draw.choices(range(VOCAB), k=prompt + draw.randrange(NEW)) for _ in range(count)]


def theirs(logits: Tensor, tokens: list[int], *processors: LogitsProcessor) -> Tensor:
    return LogitsProcessorList(processors)(torch.tensor([tokens]), logits[None])[0]


# --- one by one

SINGLE: list[tuple[dict[str, Any], LogitsProcessor]] = [
    ({"repetition_penalty": 1.3}, RepetitionPenaltyLogitsProcessor(1.3)),
    ({"repetition_penalty": 0.7}, RepetitionPenaltyLogitsProcessor(0.7)),
    ({"no_repeat_ngram_size": 1}, NoRepeatNGramLogitsProcessor(1)),
    ({"no_repeat_ngram_size": 2}, NoRepeatNGramLogitsProcessor(2)),
    ({"no_repeat_ngram_size": 3}, NoRepeatNGramLogitsProcessor(3)),
    ({"no_repeat_ngram_size": 9}, NoRepeatNGramLogitsProcessor(9)),
    (
        {"bad_words": [[4], [EOS], [3, 5], [3, 6], [1, 2, 3], [7] * 12, [8, EOS]]},
        NoBadWordsLogitsProcessor(
            [[4], [EOS], [3, 5], [3, 6], [1, 2, 3], [7] * 12, [8, EOS]], eos_token_id=EOS
        ),
    ),
    ({"suppress_tokens": [1, 5]}, SuppressTokensLogitsProcessor([1, 5])),
    (
        {"logit_bias": {0: 1.5, 7: -100, 12: 100}},
        SequenceBiasLogitsProcessor({(0,): 1.5, (7,): -100.0, (12,): 100.0}),
    ),
    ({"forced_bos_token_id": 6}, ForcedBOSTokenLogitsProcessor(6)),
]


@pytest.mark.parametrize("prompt", [1, 3])
@pytest.mark.parametrize(("options", "processor"), SINGLE, ids=lambda value: str(value)[:30])
def test_each_equals_hugging_face(
    prompt: int, options: dict[str, Any], processor: LogitsProcessor
) -> None:
    own = resolved(prompt=prompt, **options)
    pasts = histories(prompt, prompt)
    logits = random_logits(len(pasts), 1)
    ours = processed(logits, *[row_of(own, len(past) - prompt, past) for past in pasts])
    for row, past in enumerate(pasts):
        assert torch.equal(ours[row], theirs(logits[row], past, processor))


@pytest.mark.parametrize("ids", [5, [5], [9, 5]])
def test_forced_end_equals_hugging_face(ids: int | list[int]) -> None:
    own, prompt = resolved(forced_eos_token_id=ids), [3, 4, 5]
    processor = ForcedEOSTokenLogitsProcessor(len(prompt) + NEW, ids)
    for step in range(NEW):
        past, logits = [*prompt, *[1] * step], random_logits(1, step)
        row = row_of(own, step, past)
        ours = processed(logits, row)
        assert torch.equal(ours[0], theirs(logits[0], past, processor))
        assert (sample(logits, Sampling.of([row])).tokens == 5) == (step == NEW - 1)


def test_suppressed_tokens_are_stronger_than_forced_ones() -> None:
    options = {"forced_eos_token_id": [5, 6], "suppress_tokens": [10, 5]}
    past, logits = [3, 4, 1, 1, 1, 1, 1, 1], random_logits(1, 0)
    ours = processed(logits, row_of(resolved(**options), NEW - 1, past))[0]
    forced = ForcedEOSTokenLogitsProcessor(len(past) + 1, [5, 6])
    expected = theirs(logits[0], past, forced, SuppressTokensLogitsProcessor([10, 5]))
    assert torch.equal(ours, expected) and expected.isfinite().nonzero().tolist() == [[6]]


def test_minimum_equals_hugging_face() -> None:
    own = resolved(min_new_tokens=3)
    processor = MinNewTokensLengthLogitsProcessor(3, 3, EOS)
    for past in histories(5, 3):
        logits = random_logits(1, len(past))
        ours = processed(logits, row_of(own, len(past) - 3, past))
        assert torch.equal(ours[0], theirs(logits[0], past, processor))


@pytest.mark.parametrize("penalty", [1.5, 0.6])
@pytest.mark.parametrize("decoder_only", [True, False])
def test_encoder_penalty_equals_hugging_face(penalty: float, decoder_only: bool) -> None:
    """For a decoder-only model Hugging Face takes the prompt for the encoder's input."""
    own = resolved(decoder_only, encoder_repetition_penalty=penalty)
    prompt = [3, 3, 9]
    processor = EncoderRepetitionPenaltyLogitsProcessor(penalty, torch.tensor([prompt]))
    for step in range(4):
        past = [*(prompt if decoder_only else [0]), *[7, 8, 9, 1][:step]]
        logits = random_logits(1, step)
        row = row_of(own, step, past, () if decoder_only else prompt)
        assert torch.equal(processed(logits, row)[0], theirs(logits[0], past, processor))


def test_the_start_token_counts_though_it_is_the_pad_token_too() -> None:
    """No position is padding: a T5 decoder's 0 is a token that was read, as in Hugging Face."""
    own = resolved(decoder_only=False, repetition_penalty=2.0)
    row = row_of(own, 1, [0, 5], [9, 9, 1])
    assert row.edit is not None and row.edit.seen == (0, 5)
    logits = torch.full((1, VOCAB), 4.0)
    expected = theirs(logits[0], [0, 5], RepetitionPenaltyLogitsProcessor(2.0))
    assert torch.equal(processed(logits, row)[0], expected)


def test_presence_and_frequency_are_openais() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, over generated tokens alone."""
    own = resolved(presence_penalty=0.5, frequency_penalty=-0.25, repetition_penalty=2.0)
    prompt, generated = [7, 7, 8], [3, 4, 3, 3]
    logits = random_logits(1, 3)
    ours = processed(logits, row_of(own, 4, prompt + generated))[0]
    penalised = RepetitionPenaltyLogitsProcessor(2.0)
    expected = theirs(logits[0], prompt + generated, penalised)
    expected[3] -= 0.5 - 0.25 * 3
    expected[4] -= 0.5 - 0.25
    assert torch.allclose(ours, expected, atol=1e-6)
    assert row_of(resolved(presence_penalty=1.0), 0, [1, 2, 3]).edit is None


# --- together, in Hugging Face's order


@cache
def models() -> dict[str, PreTrainedModel]:
    return {name: FAMILIES[name].build() for name in ("gpt2", "t5")}


def their_processors(
    family: str, options: dict[str, Any], prompt: list[int], used: int
) -> LogitsProcessorList:
    """What Hugging Face's generate would apply, greedy."""
    names = {"bad_words": "bad_words_ids", "logit_bias": "sequence_bias"}
    fields = {names.get(name, name): value for name, value in options.items()}
    if bias := fields.get("sequence_bias"):
        fields["sequence_bias"] = {(token,): float(value) for token, value in bias.items()}
    config = GenerationConfig(**fields, max_length=used + NEW)
    config._eos_token_tensor = torch.tensor([EOS])
    return models()[family]._get_logits_processor(
        config, input_ids_seq_length=used, encoder_input_ids=torch.tensor([prompt]), device="cpu"
    )


CHOICES: dict[str, list[Any]] = {
    "repetition_penalty": [1.3, 0.8],
    "encoder_repetition_penalty": [1.7, 0.5],
    "no_repeat_ngram_size": [1, 2, 3],
    "bad_words": [[[4], [3, 5]], [[EOS], [1, 1, 6]]],
    "min_new_tokens": [1, 4],
    "forced_bos_token_id": [6, 9],
    "forced_eos_token_id": [EOS, 7, [5, 6]],
    "suppress_tokens": [[1], [10, 5]],
    "logit_bias": [{3: 2.0}, {0: -9.5, 12: 9.5}],
}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["gpt2", "t5"]), st.integers(1, 4), st.integers(0, NEW - 1), st.data())
def test_all_together_equal_hugging_face(
    family: str, length: int, step: int, data: st.DataObject
) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(CHOICES)), min_size=2, unique=True))
    options = {name: data.draw(st.sampled_from(CHOICES[name])) for name in names}
    token = st.integers(0, VOCAB - 1)
    prompt = data.draw(st.lists(token, min_size=length, max_size=length))
    past = data.draw(st.lists(token, min_size=step, max_size=step))
    decoder_only = family == "gpt2"
    tokens = [*(prompt if decoder_only else [0]), *past]
    logits = random_logits(1, data.draw(st.integers(0, 99)))
    expected = their_processors(family, options, prompt, len(tokens) - step)(
        torch.tensor([tokens]), logits.clone()
    )
    own = resolved(decoder_only, len(prompt), **options)
    row = row_of(own, step, tokens, () if decoder_only else prompt)
    assert torch.equal(processed(logits, row), expected)
    drawn = sample(logits, Sampling.of([row]))
    assert drawn.finite.item() == bool(expected.isfinite().any())
    assert not drawn.finite or drawn.tokens.item() == expected.argmax()


# --- rows


def mixed_rows() -> list[SampleRow]:
    past = [3, 4, 3, 9, 3]
    options: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.4},
        {"logit_bias": {5: 3.0}, "presence_penalty": 1.0},
        {"encoder_repetition_penalty": 2.0, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
        {"no_repeat_ngram_size": 2, "suppress_tokens": [0]},
        {"forced_eos_token_id": [8, 4]},
        {"do_sample": True, "seed": 3, "min_p": 0.1, "repetition_penalty": 1.2},
        {"do_sample": True, "seed": 4, "typical_p": 0.5, "logprobs": 2},
        {"logprobs": 0, "bad_words": [[3, 1]]},
    ]
    rows = [row_of(resolved(**own), 2, past) for own in options]
    ends = resolved(forced_eos_token_id=[8, 4], logprobs=4)
    return [*rows, row_of(ends, NEW - 1, [*past, 1, 1, 1])]


def test_a_row_alone_equals_the_row_among_others() -> None:
    rows = mixed_rows()
    logits = random_logits(len(rows), 8)
    before = logits.clone()
    together, drawn = processed(logits, *rows), sample(logits, Sampling.of(rows))
    assert torch.equal(logits, before)
    assert torch.equal(together[0], logits[0])
    asked = 0
    for i, row in enumerate(rows):
        one = logits[i : i + 1]
        assert torch.equal(processed(one, row)[0], together[i])
        alone = sample(one, Sampling.of([row]))
        assert alone.tokens[0] == drawn.tokens[i]
        if row.logprobs is None:
            assert alone.logprobs is None
            continue
        assert alone.logprobs is not None and drawn.logprobs is not None
        assert alone.logprobs.chosen[0] == drawn.logprobs.chosen[asked]
        assert torch.equal(alone.logprobs.top[0], drawn.logprobs.top[asked, : row.logprobs])
        asked += 1


def test_rows_cross_to_other_processes() -> None:
    for row in mixed_rows():
        other = pickle.loads(pickle.dumps(row))
        assert other == row and hash(other[:-1]) == hash(row[:-1])


def test_rows_that_ask_for_nothing_carry_nothing() -> None:
    row = row_of(resolved(), 2, [1, 2, 3, 4, 5])
    assert row == SampleRow(step=2) and row.edit is None and row.history is None
    found = Sampling.of([row, row])
    assert found.edits is None and found.wanted is None and not found.any_banned


def test_a_sick_row_leaves_the_others_alone() -> None:
    rows = mixed_rows()
    logits = random_logits(len(rows), 9)
    good = sample(logits, Sampling.of(rows)).tokens
    logits[1, 3], logits[3, 3], logits[-1, 0] = float("nan"), INF, float("nan")
    drawn = sample(logits, Sampling.of(rows))
    sick = [i in (1, 3, len(rows) - 1) for i in range(len(rows))]
    assert drawn.finite.tolist() == [not s for s in sick]
    assert torch.equal(drawn.tokens, torch.where(torch.tensor(sick), 0, good))


def test_minus_infinity_stays_unless_forced() -> None:
    logits = torch.zeros(4, 4)
    logits[:, 1] = -INF
    edits = Edits.of(
        [
            Edit(bias=((1, 100.0),), counted=((1, -2.0),)),
            Edit(seen=(1,), repetition_penalty=0.01, prompt=(1,), encoder_repetition_penalty=100.0),
            Edit(forced=(1,)),
            None,
        ]
    )
    assert edits is not None
    assert edits.apply(logits)[:, 1].tolist() == [-INF, -INF, 0.0, -INF]


def test_ids_outside_the_vocabulary_are_skipped() -> None:
    logits = random_logits(2, 1)
    edits = Edits.of([Edit(bias=((0, 1.0), (99, 5.0))), Edit(forced=(99, 3))])
    assert edits is not None
    changed = edits.apply(logits)
    assert changed[0, 0] == logits[0, 0] + 1 and torch.equal(changed[0, 1:], logits[0, 1:])
    assert changed[1].isfinite().nonzero()[:, 0].tolist() == [3]


def test_a_row_with_everything_excluded_is_not_finite() -> None:
    own = resolved(suppress_tokens=list(range(VOCAB)))
    assert not sample(random_logits(1, 0), Sampling.of([row_of(own, 0, [1])])).finite.item()


def test_the_graph_is_static() -> None:
    """Fake tensors have no values: a read of one by the host would fail."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    rows = mixed_rows()
    found = Sampling.of(rows)
    with FakeTensorMode(allow_non_fake_inputs=True):
        drawn = sample(torch.empty(len(rows), 300), found)
    assert drawn.tokens.shape == (len(rows),) and drawn.logprobs is not None


# --- bans on the host


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
def test_ngram_bans_equal_a_plain_search(tokens: list[int], size: int) -> None:
    known = {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)}
    prefix = tuple(tokens[len(tokens) - size + 1 :]) if len(tokens) >= size else None
    expected = {gram[-1] for gram in known if gram[:-1] == prefix}
    assert set(ngram_bans(tokens, size)) == expected


def test_word_bans() -> None:
    words = [(1,), (2, 3), (1, 2, 4), (9, 1, 2, 5), (3, 6)]
    assert word_bans([1, 2], words) == [1, 3, 4]
    assert word_bans([], words) == [1]


# --- log-probabilities


def test_logprobs_are_the_models_own() -> None:
    own = resolved(logprobs=3, repetition_penalty=5.0, suppress_tokens=[4], do_sample=True, seed=1)
    rows = [row_of(own, 1, [3, 3, 3, 5]), resolved().row(0), resolved(logprobs=0).row(0)]
    logits = random_logits(3, 4)
    drawn = sample(logits, Sampling.of(rows))
    assert drawn.logprobs is not None
    scores = logits.log_softmax(-1)[[0, 2]]
    assert torch.equal(drawn.logprobs.chosen, scores[[0, 1], drawn.tokens[[0, 2]]])
    assert torch.equal(drawn.logprobs.top, scores.topk(3).values)
    assert torch.equal(drawn.logprobs.ids, scores.topk(3).indices)


def test_no_more_alternatives_than_the_vocabulary() -> None:
    wanted = Wanted.of([20])
    assert wanted is not None
    found = wanted.look_up(torch.zeros(1, 5), torch.tensor([2]))
    assert found.ids.shape == (1, 5) and found.chosen.exp().item() == pytest.approx(0.2)
