"""Draws as graphs make them, run by torch itself: bitwise those of the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lmi_multi.backends.neuron import sampling
from torch import Tensor

from lmi_multi.ops.rules import History, Rules
from lmi_multi.ops.sampling import SampleRow, Sampling, sample


def check(logits: Tensor, rows: list[SampleRow]) -> None:
    expected = sample(logits, Sampling.of(rows))
    tokens, best = sampling.draw(logits, *sampling.options(rows, len(rows)))
    assert torch.equal(torch.isfinite(best), expected.finite)
    assert torch.equal(torch.where(expected.finite, tokens, 0), expected.tokens)


some_rows = st.builds(
    lambda **given: SampleRow(**given),  # of a tuple, builds would fill every field
    temperature=st.sampled_from([0.0, 1e-30, 1e-3, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 50, 2**40]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999999, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 1000),
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(some_rows, min_size=1, max_size=4),
    vocab=st.sampled_from([1, 2, 16, 17, 97, 1000]),
    spread=st.sampled_from([1e-6, 0.3, 1.0, 10.0, 1e4]),
    shift=st.sampled_from([0.0, -7.5, 100.0]),
    rounded=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_draws_are_those_of_the_reference(
    rows: list[SampleRow], vocab: int, spread: float, shift: float, rounded: bool, seed: int
) -> None:
    """Ties, both zeros, logits of one sign and of both, filters that keep one or all."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), vocab, generator=generator) * spread + shift
    check(logits.round() if rounded else logits, rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite(value: float) -> None:
    rows = [SampleRow(temperature=t, top_k=3, top_p=0.9, seed=1) for t in (0.0, 1.0, 2.0)]
    logits = torch.linspace(-3, 3, 30).view(3, 10)
    check(logits, rows)
    logits[1, 4] = value
    check(logits, rows)
    check(torch.full((3, 10), value), rows)


def test_a_large_vocabulary_does_not_overflow() -> None:
    """Where every weight has all ones in its lower limbs, their sums are the largest."""
    count = sampling.MOST_VOCAB
    weights = torch.full((3, 1, count), 2**sampling.LIMB_BITS - 1, dtype=torch.int32)
    high, middle, low = sampling._sum(weights, torch.ones(1, 1, count, dtype=torch.bool))
    total = (int(high) << 26) + (int(middle) << 13) + int(low)
    assert total == count * (2**39 - 1)
    check(torch.randn(2, 200_000), [SampleRow(temperature=1.0, top_p=0.99, seed=i) for i in (1, 2)])


def test_what_graphs_leave_to_the_host() -> None:
    plain = SampleRow(temperature=0.5, top_k=3, top_p=0.5)
    assert sampling.can_draw(plain)
    assert sampling.can_draw(SampleRow(min_p=0.5))
    for more in (
        {"banned": (3,)},
        {"min_p": 0.1},
        {"typical_p": 0.9},
        {"logprobs": 0},
        {"rules": Rules(repetition_penalty=1.5), "history": History([5], 1)},
        {"forced": (3,)},
    ):
        assert not sampling.can_draw(plain._replace(**more))
