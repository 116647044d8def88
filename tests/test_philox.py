"""Philox4x32-10 against Random123's known answers and a slow second implementation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmi_multi.ops.philox import philox4x32, uniform

WORD = 2**32 - 1

# Random123, tests/kat_vectors, the three lines "philox4x32 10": counter, key, output.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def slow(counter: list[int], key: list[int]) -> list[int]:
    """Section 3.3 of the paper in plain integers."""
    r0, l0, r1, l1 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * r0, 0xCD9E8D57 * r1
        r0, l0, r1, l1 = (p1 >> 32) ^ l0 ^ k0, p1 & WORD, (p0 >> 32) ^ l1 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [r0, l0, r1, l1]


def columns(rows: list[list[int]]) -> np.ndarray:
    return np.array(rows, dtype=np.uint64).T


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert philox4x32(columns([counter]), columns([key]))[:, 0].tolist() == expected
    assert slow(counter, key) == expected


def test_vectorised_over_many() -> None:
    counters, keys = [k[0] for k in KNOWN], [k[1] for k in KNOWN]
    assert philox4x32(columns(counters), columns(keys)).T.tolist() == [k[2] for k in KNOWN]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, WORD))
def test_uniform_is_the_top_of_the_first_word(seed: int, step: int, stream: int) -> None:
    word = slow([step & WORD, step >> 32, stream, 0], [seed & WORD, seed >> 32])[0]
    number = uniform([seed], [step], stream)
    assert number.dtype == np.float32 and number.shape == (1,)
    assert float(number[0]) == (word >> 8) / 2**24
    assert 0 <= number[0] < 1


def test_uniform_does_not_depend_on_the_batch() -> None:
    seeds, steps = [5, 2**64 - 1, 5, 0], [0, 7, 1, 2**40]
    together = uniform(seeds, steps)
    assert together.tolist() == [
        float(uniform([a], [b])[0]) for a, b in zip(seeds, steps, strict=True)
    ]
    assert len(set(together.tolist())) == 4


def test_uniform_is_uniform() -> None:
    numbers = uniform(np.full(40_000, 12345), np.arange(40_000))
    counts = np.bincount((numbers * 100).astype(int), minlength=100)
    # 99 degrees of freedom: mean 99, standard deviation 14; five of those above.
    assert ((counts - 400) ** 2 / 400).sum() < 170
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02


def test_neighbouring_seeds_are_unrelated() -> None:
    at_step_0 = uniform(np.arange(10_000), np.zeros(10_000, dtype=int))
    assert abs(float(at_step_0.mean()) - 0.5) < 0.015
    assert abs(np.corrcoef(at_step_0[:-1], at_step_0[1:])[0, 1]) < 0.04


def test_empty() -> None:
    assert uniform([], []).shape == (0,)
