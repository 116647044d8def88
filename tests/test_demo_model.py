"""The trained demo model through the engine: what dtype, quantization and ranks cost."""

from __future__ import annotations

import pytest

import lmi_multi
from lmi_multi.demo import CHECKPOINT, EXAMPLES
from lmi_multi.demo.spoken import HELD_OUT_SEED, pairs
from lmi_multi.errors import OptionError

HELD_OUT = pairs(HELD_OUT_SEED, 2000)[::10]


def exact_match(**settings: object) -> float:
    """The share of held-out sentences that come out right."""
    with lmi_multi.load("demo", backend="cpu", max_batch=64, max_tokens=128, **settings) as model:  # type: ignore[arg-type]
        answers = model.generate([spoken for spoken, _ in HELD_OUT])
    right = [a.text == written for a, (_, written) in zip(answers, HELD_OUT, strict=True)]
    return sum(right) / len(right)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_exact_match(dtype: str) -> None:
    assert exact_match(dtype=dtype) >= 0.98


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_quantization_costs_at_most_half_a_point(quantize: str) -> None:
    assert exact_match(dtype="bf16", quantize=quantize) >= exact_match(dtype="bf16") - 0.005


@pytest.mark.parametrize("quantize", [None, "int8", "fp8"])
def test_two_ranks_say_the_same(quantize: str | None) -> None:
    answers = []
    for ranks in (1, 2):
        with lmi_multi.load(
            CHECKPOINT, backend="cpu", dtype="fp32", quantize=quantize, tensor_parallel=ranks
        ) as model:
            answers.append([c.token_ids for c in model.generate(list(EXAMPLES))])
    assert answers[0] == answers[1]


def test_an_answer_that_would_be_cut_is_refused() -> None:
    with lmi_multi.load("demo", backend="cpu", max_tokens=20) as model:
        assert model.generate("one", max_new_tokens=19)[0].text == "1"
        with pytest.raises(OptionError, match="prompt 1 has 31 tokens, must be at most 20"):
            model.generate(["one", "x" * 30])
        with pytest.raises(OptionError, match="max_new_tokens is 20"):
            model.generate("one", max_new_tokens=20)
