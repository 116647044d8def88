"""The sampler against Hugging Face's warpers, exact probabilities, and itself in other batches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from lmi_multi.ops import philox, sampling
from lmi_multi.ops.sampling import SampleRow, Sampling, sample, uniform, uniforms

INF = float("inf")


def draw(logits: Tensor, *rows: SampleRow) -> list[int]:
    drawn = sample(logits, Sampling.of(rows))
    assert drawn.tokens.dtype == torch.int64 and drawn.finite.all()
    return drawn.tokens.tolist()


def random_logits(rows: int, vocab: int, seed: int = 0, ties: bool = False) -> Tensor:
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    return (logits * 2).round() / 2 if ties else logits


def hugging_face(logits: Tensor, row: SampleRow) -> Tensor:
    """Probabilities [vocab] of one row of logits."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(row.temperature))])
    if row.top_k:
        warpers.append(TopKLogitsWarper(row.top_k))
    if row.top_p < 1:
        warpers.append(TopPLogitsWarper(row.top_p))
    if row.min_p:
        warpers.append(MinPLogitsWarper(row.min_p))
    if row.typical_p < 1:
        warpers.append(TypicalLogitsWarper(row.typical_p))
    return warpers(torch.zeros(1, 1, dtype=torch.int64), logits[None]).softmax(-1)[0]


def probabilities(logits: Tensor, *rows: SampleRow) -> Tensor:
    """The sampler's own weights as probabilities [rows, vocab], in float64."""
    settings_ = Sampling.of(rows)
    weights = sampling._weights(logits / settings_.temperature[:, None], settings_).double()
    return weights / weights.sum(-1, keepdim=True)


# --- greedy


def test_greedy_is_argmax_and_the_lowest_of_equals() -> None:
    logits = random_logits(5, 1000, ties=True)
    expected = [row.tolist().index(max(row.tolist())) for row in logits]
    assert draw(logits, *[SampleRow()] * 5) == expected
    assert draw(torch.zeros(2, 40_000), SampleRow(), SampleRow()) == [0, 0]
    # The same in a batch where another row is sampled.
    assert draw(logits, *[SampleRow()] * 4, SampleRow(1.0))[:4] == expected[:4]


def test_greedy_batches_skip_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_weights", "_draw", "_ban"):
        monkeypatch.setattr(sampling, name, None)
    rows = [SampleRow(top_k=50, top_p=0.5, seed=3, min_p=0.1, typical_p=0.5), SampleRow()]
    settings_ = Sampling.of(rows)
    assert not (settings_.any_sampled or settings_.any_filtered or settings_.any_banned)
    assert not (settings_.any_min_p or settings_.any_typical)
    assert settings_.edits is None and settings_.wanted is None
    assert sample(random_logits(2, 9), settings_).finite.all()


def test_logits_are_left_as_they_are() -> None:
    logits = random_logits(2, 100)
    before = logits.clone()
    draw(logits, SampleRow(0.5, 10, 0.9, banned=(3,)), SampleRow(banned=(1, 2)))
    assert torch.equal(logits, before)


# --- filters


CASES = [
    SampleRow(1.0),
    SampleRow(0.7, 5),
    SampleRow(1.3, 50),
    SampleRow(1.0, 0, 0.9),
    SampleRow(0.8, 0, 0.3),
    SampleRow(1.0, 50, 0.95),
    SampleRow(0.6, 200, 0.5),
    SampleRow(2.0, 1, 0.5),
    SampleRow(1.0, 100_000, 0.8),
    SampleRow(1.0, 20, 0.001),
    SampleRow(0.01, 0, 0.999),
    SampleRow(1.0, min_p=0.05),
    SampleRow(0.8, 50, min_p=0.3),
    SampleRow(1.0, 0, 0.8, min_p=1.0),
    SampleRow(1.5, min_p=1e-9),
    SampleRow(1.0, typical_p=0.9),
    SampleRow(1.2, typical_p=0.2),
    SampleRow(1.0, 50, 0.9, typical_p=0.6),
    SampleRow(0.9, 30, 0.95, min_p=0.02, typical_p=0.7),
    SampleRow(1.0, typical_p=1e-9),
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_filters_equal_hugging_face(case: SampleRow, ties: bool) -> None:
    logits = random_logits(20, 300, seed=1, ties=ties)
    ours = probabilities(logits, *[case] * 20)
    for i, row in enumerate(logits):
        theirs = hugging_face(row, case)
        if ties:  # which of equal logits go is left to the sort, how many is not
            rising = ours[i][row.argsort(stable=True)].diff() >= 0
            assert case.typical_p < 1 or rising.all()
            ours[i], theirs = ours[i].sort()[0], theirs.sort()[0]
        assert torch.equal(ours[i] > 0, theirs > 2.0**-37), f"row {i} keeps other tokens"
        assert (ours[i] - theirs).abs().max() < 1e-6


def test_the_case_of_equal_logits() -> None:
    even = torch.zeros(1, 10)
    # Top-p keeps the highest ids, as a stable sort would; top-k keeps what ties with the k-th.
    assert (probabilities(even, SampleRow(1.0, 0, 0.5)) > 0)[0].tolist() == [False] * 5 + [True] * 5
    assert (probabilities(even, SampleRow(1.0, 0, 0.9)) > 0).sum() == 9
    assert (probabilities(torch.zeros(1, 5), SampleRow(1.0, 0, 0.8)) > 0).sum() == 4
    assert (probabilities(even, SampleRow(1.0, 3)) > 0).sum() == 10
    assert (probabilities(torch.zeros(1, 5000), SampleRow(1.0, 3, 0.5)) > 0).sum() == 2500


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(-6, 6), min_size=2, max_size=40),
    st.integers(1, 45),
    st.floats(1e-9, 1.0),
    st.integers(1, 8),
)
def test_a_partial_sort_gives_what_a_full_sort_gives(
    values: list[int], top_k: int, top_p: float, window: int
) -> None:
    """With the window cut to anything at least top_k, runs of equal logits leave it."""
    logits = torch.tensor([values], dtype=torch.float32)
    whole = replace(Sampling.of([SampleRow(1.0, top_k, top_p)]), window=-1)
    part = replace(whole, window=top_k + window)
    assert torch.equal(sampling._weights(logits, whole), sampling._weights(logits, part))


def test_the_window_follows_the_rows() -> None:
    def window(*rows: SampleRow) -> int:
        return Sampling.of(rows).window

    assert window(SampleRow(1.0), SampleRow(0.0, 7, 0.5)) == 0
    assert window(SampleRow(1.0, 50), SampleRow(1.0), SampleRow()) == 64
    assert window(SampleRow(1.0, 50, 0.9), SampleRow(1.0, 65)) == 256
    assert window(SampleRow(1.0, 1024)) == 1024
    assert window(SampleRow(1.0, 1025)) == -1
    assert window(SampleRow(1.0, 50), SampleRow(1.0, 0, 0.9)) == -1


def test_rows_keep_their_own_settings() -> None:
    """An unfiltered row beside filtered ones keeps its whole vocabulary."""
    logits = random_logits(len(CASES), 500, seed=4)
    together = probabilities(logits, *CASES)
    for i, case in enumerate(CASES):
        assert torch.equal(together[i], probabilities(logits[i : i + 1], case)[0])
    assert (together[0] > 0).all()


# --- draws


def chi_square(counts: Tensor, expected: Tensor) -> tuple[float, int]:
    """The statistic and its degrees of freedom; what is expected under 5 times is pooled."""
    rare = expected < 5
    observed = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    return float(((observed - wanted) ** 2 / wanted).sum()), len(wanted) - 1


@pytest.mark.parametrize(
    "case",
    [
        *(CASES[0], CASES[2], CASES[3], CASES[5], SampleRow(1.0, 8, 0.7)),
        *(CASES[11], CASES[12], CASES[15], CASES[17], CASES[18]),
    ],
)
@pytest.mark.parametrize("by", ["step", "seed"])
def test_draws_follow_the_probabilities(case: SampleRow, by: str) -> None:
    draws = 20_000
    logits = random_logits(1, 64, seed=7)[0] / 2
    common = case._replace(seed=99, step=3)
    rows = [common._replace(**{by: i // 16, "stream": i % 16}) for i in range(draws)]
    tokens = sample(logits.expand(draws, -1), Sampling.of(rows)).tokens
    expected = hugging_face(logits, case).double() * draws
    counts = torch.bincount(tokens, minlength=64)
    assert not counts[expected == 0].any()
    statistic, freedom = chi_square(counts, expected)
    # Wilson and Hilferty's approximation of the quantile at z = 4: once in 30,000 by chance.
    z = 2 / (9 * freedom)
    assert statistic < freedom * (1 - z + 4 * math.sqrt(z)) ** 3


def test_min_p_and_typical_of_equal_logits_keep_them_all() -> None:
    even = torch.zeros(1, 10)
    for row in (SampleRow(1.0, min_p=1.0), SampleRow(1.0, typical_p=0.1)):
        assert (probabilities(even, row) > 0).all()


def test_typical_may_drop_the_likeliest() -> None:
    """The point of it: what is too likely says too little."""
    logits = torch.tensor([[0.6, *[0.04] * 10]]).log()
    kept = probabilities(logits, SampleRow(1.0, typical_p=0.3))[0] > 0
    assert torch.equal(kept, hugging_face(logits[0], SampleRow(1.0, typical_p=0.3)) > 0)
    assert kept[0].item() != kept[1].item()


def test_streams_keep_equal_seeds_apart() -> None:
    logits = random_logits(1, 1000).expand(8, -1)
    rows = [SampleRow(3.0, seed=5, stream=i // 2) for i in range(8)]
    tokens = draw(logits, *rows)
    assert tokens[::2] == tokens[1::2] and len(set(tokens)) > 2


def test_the_draw_inverts_the_distribution_in_vocabulary_order() -> None:
    logits = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log()
    steps = [SampleRow(1.0, seed=11, step=i) for i in range(200)]
    tokens = draw(logits.expand(200, -1), *steps)
    for number, token in zip(philox.uniform([11] * 200, range(200)), tokens, strict=True):
        assert token == (0 if number < 0.5 else 2 if number < 0.75 else 3)


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-24])
def test_the_ends_of_the_range_never_draw_what_is_masked(number: float) -> None:
    logits = random_logits(4, 50_000, seed=2)
    logits[:, :10] = logits[:, -10:] = -INF
    rows = [SampleRow(1.0), SampleRow(1.0, 40), SampleRow(1.0, 0, 0.9), SampleRow(1.0, 40, 0.9)]
    settings_ = Sampling.of(rows)
    settings_ = replace(settings_, uniform=torch.full_like(settings_.uniform, number))
    tokens = sample(logits, settings_).tokens
    weights = sampling._weights(logits, settings_)
    for row, token in enumerate(tokens.tolist()):
        kept = weights[row].nonzero()[:, 0]
        assert token == (kept[0] if number == 0 else kept[-1])


@pytest.mark.parametrize("vocab", [2, 31, 384, 5003])
def test_a_row_alone_equals_the_row_among_others(vocab: int) -> None:
    rows = [
        case._replace(seed=2**63 + i, step=5 * i)
        for i, case in enumerate([*CASES, SampleRow(), SampleRow(banned=(1,)), *CASES])
    ]
    logits = random_logits(len(rows), vocab, seed=3)
    together = draw(logits, *rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    assert [draw(logits[i : i + 1], rows[i])[0] for i in range(len(rows))] == together
    assert draw(logits[order], *[rows[i] for i in order]) == [together[i] for i in order]


def test_tiny_temperatures_are_greedy() -> None:
    logits = random_logits(8, 200)
    for temperature in (1e-4, 1e-20, 1e-45, 5e-324):
        rows = [SampleRow(temperature, 50, 0.9, seed=i) for i in range(8)]
        assert draw(logits, *rows) == logits.argmax(-1).tolist()
    huge = draw(logits, *[SampleRow(1e300, seed=i) for i in range(8)])
    assert len(set(huge)) > 1


@pytest.mark.parametrize("top_k", [1, 40])
def test_top_k_of_one_and_a_vocabulary_of_one(top_k: int) -> None:
    row = SampleRow(1.0, top_k, 0.9, seed=1)
    assert draw(torch.zeros(1, 1), row) == [0]
    logits = random_logits(1, 77)
    assert draw(logits, row._replace(top_k=1)) == [int(logits.argmax())]


# --- bans


def test_temperatures_beyond_float32_ban_all_the_same() -> None:
    logits = torch.randn(40, 10)
    rows = [SampleRow(1e39, seed=i, banned=(3,)) for i in range(40)]
    tokens = draw(logits, *rows)
    assert tokens == draw(logits, *[row._replace(temperature=1e30) for row in rows])
    assert 3 not in tokens and max(tokens) < 10 and len(set(tokens)) > 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_not_drawn(temperature: float) -> None:
    logits = torch.zeros(64, 6)
    rows = [
        SampleRow(temperature, seed=i, banned=((), (0,), (0, 3), (1, 2, 3, 4, 5))[i % 4])
        for i in range(64)
    ]
    tokens = draw(logits, *rows)
    assert not any(token in row.banned for token, row in zip(tokens, rows, strict=True))
    if not temperature:
        assert tokens[:4] == [0, 1, 1, 0]


def test_bans_outside_the_vocabulary_are_skipped() -> None:
    assert draw(torch.zeros(2, 3), SampleRow(banned=(50256, -7)), SampleRow(banned=(0,))) == [0, 1]


def test_bans_come_before_top_k() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0]])
    assert draw(logits, SampleRow(1.0, 1, banned=(0,))) == [1]


# --- rows that are not finite


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("top_k", [0, 20])
def test_bad_rows_are_flagged_and_leave_the_others_alone(
    temperature: float, top_p: float, top_k: int
) -> None:
    logits = random_logits(6, 400)
    rows = [SampleRow(temperature, top_k, top_p, seed=i) for i in range(6)]
    good = draw(logits, *rows)
    bad = logits.clone()
    bad[1, 17], bad[3, 399], bad[4] = float("nan"), INF, -INF
    drawn = sample(bad, Sampling.of(rows))
    assert drawn.finite.tolist() == [True, False, True, False, False, True]
    assert drawn.tokens.tolist() == [good[0], 0, good[2], 0, 0, good[5]]


def test_a_ban_does_not_hide_an_infinity() -> None:
    logits = torch.zeros(4, 5)
    logits[0, 2], logits[1, 2] = INF, float("nan")
    rows = [SampleRow(banned=(2,)), SampleRow(banned=(2,)), SampleRow(banned=tuple(range(5)))]
    assert sample(logits, Sampling.of([*rows, SampleRow()])).finite.tolist() == [
        False,
        False,
        False,
        True,
    ]


def test_minus_infinity_means_never() -> None:
    logits = torch.full((100, 9), -INF)
    logits[:, 4] = logits[:, 6] = 1.0
    rows = [SampleRow(1.0, (0, 5)[i % 2], (1.0, 0.9)[i // 50], seed=i) for i in range(100)]
    assert set(draw(logits, *rows)) == {4, 6}


# --- no waiting for the device


@pytest.mark.parametrize(
    "rows", [[SampleRow()] * 2, [SampleRow(1.0, 5, 0.9, banned=(1,), min_p=0.1, typical_p=0.5)] * 2]
)
def test_the_graph_is_static(rows: list[SampleRow]) -> None:
    """Fake tensors have no values: a read of one by the host would fail."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    settings_ = Sampling.of(rows)
    with FakeTensorMode(allow_non_fake_inputs=True):
        drawn = sample(torch.empty(2, 300), settings_)
    assert drawn.tokens.shape == (2,) and drawn.finite.shape == (2,)


def test_random_numbers_of_several_steps_are_those_of_each() -> None:
    rows = [SampleRow(1.0, seed=2**64 - 1, step=2**33), SampleRow(1.0, seed=5, step=3, stream=7)]
    together = uniforms(rows, 4)
    assert together.shape == (4, 2)
    for number, own in enumerate(together):
        later = [row.at(row.step + number, row.stream) for row in rows]
        assert own.tolist() == uniform(later, "cpu").tolist()
        each = [philox.uniform([r.seed], [r.step], r.stream)[0] for r in later]
        assert own.tolist() == each
    assert uniforms([], 4).shape == (4, 0)


def test_what_continues_a_row() -> None:
    row = SampleRow(0.5, seed=3, step=6, stream=1)
    assert row.at(7, 1).continues(row)
    for other in (row, row.at(8, 1), row.at(7, 2), row.at(7, 1)._replace(seed=4)):
        assert not other.continues(row)
