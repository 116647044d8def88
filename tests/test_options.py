"""A call's options: what they may be, and how prompts get theirs."""

from __future__ import annotations

import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from lmi_multi.completion import Completion
from lmi_multi.errors import OptionError
from lmi_multi.options import GenerateOptions, per_prompt

NAN, INF = float("nan"), float("inf")


def refused(**options: Any) -> str:
    with pytest.raises(OptionError) as caught:
        GenerateOptions(**options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message


# --- values


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [0, -1, 1.0, "5", True, NAN, [3]]),
        ("max_length", [0, -1, 2.5, False]),
        ("min_new_tokens", [-1, 0.0, True]),
        ("min_length", [-1, "0"]),
        ("do_sample", [0, 1, "yes", []]),
        ("temperature", [0, 0.0, -0.5, NAN, INF, -INF, "1", True, 10**400, np.float32("nan")]),
        ("top_k", [-1, 5.0, True, "5", NAN]),
        ("top_p", [0, -0.1, 1.0001, NAN, INF, True, "0.5"]),
        ("seed", [-1, 2**64, 1.5, True, "x"]),
        ("ignore_eos", [1, 0, "no"]),
        ("stop", ["", [""], ["a", ""], ["a", 3], 5, ["x"] * 17, ["x"] * 10_000, {"a": 1}, b"a"]),
        ("min_p", [-0.1, 1.1, NAN, INF, True, "0"]),
        ("typical_p", [0, 1.01, -1, NAN, True]),
        ("repetition_penalty", [0, -1.0, 0.009, 101, NAN, INF, True, "1"]),
        ("encoder_repetition_penalty", [0, 1000, NAN, -INF]),
        ("presence_penalty", [-2.1, 2.1, NAN, INF, True]),
        ("frequency_penalty", [-3, 3, NAN]),
        ("no_repeat_ngram_size", [-1, 1.5, True, INF]),
        ("bad_words", ["", [""], [[]], [[-1]], [[1.5]], [1, 2], [["a"]], [[True]], 3, b"a"]),
        ("bad_words", [["a"] * 1025, [[1] * 65], ["x" * 257], [None], [[2**31]], {"a": 1}]),
        ("suppress_tokens", [[-1], ["1"], 5, [1.0], [True], list(range(4097)), [10**30], [NAN]]),
        ("stop_token_ids", [[-1], 7, ["a"], [None]]),
        ("forced_bos_token_id", [-1, 1.0, "2", [1], True, 2**31]),
        ("forced_eos_token_id", [-1, [-1], "2", [1, None], True]),
        ("logit_bias", [{1: 100.1}, {1: -101}, {1: NAN}, {1: INF}, {-1: 1}, {1: "2"}, {1: True}]),
        ("logit_bias", [{"a": 1}, {"-1": 1}, {1.5: 1}, [1, 2], 3, {True: 1}, {"²": 1}]),
        ("logit_bias", [dict.fromkeys(range(4097), 1), {10**20: 1}, {"9" * 30: 1}, [[1, 2, 3]]]),
        ("logprobs", [-1, 21, True, 1.5]),
        ("return_full_text", [1, "yes"]),
        ("num_return_sequences", [0, 17, -1, 1.0, True]),
    ],
)
def test_values_out_of_range(name: str, values: list[Any]) -> None:
    allowed = GenerateOptions.model_fields[name].description
    for value in values:
        message = refused(**{name: value})
        assert message.startswith(f"{name} is ") and message.endswith(f"; allowed: {allowed}")
        assert repr(value)[:30] in message


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [1, 10**6, np.int64(3), None]),
        ("min_new_tokens", [0, np.uint8(4)]),
        ("temperature", [1, 0.1, 1e-300, 1e300, np.float32(0.5), Fraction(1, 2)]),
        ("top_k", [0, 1, 10**9]),
        ("top_p", [1, 1.0, 1e-12]),
        ("seed", [0, 2**64 - 1]),
        ("do_sample", [True, False, None]),
        ("stop", ["x", ["x", "yy"], ("x",) * 16, [], None]),
    ],
)
def test_values_in_range(name: str, values: list[Any]) -> None:
    for value in values:
        stored = getattr(GenerateOptions(**{name: value}), name)
        assert type(stored) in (int, float, bool, tuple, type(None))
        if name != "stop":
            assert stored == value


def test_stop_becomes_a_tuple() -> None:
    assert GenerateOptions(stop="ab").stop == ("ab",)
    assert GenerateOptions(stop=["b", "a"]).stop == ("b", "a")


def test_lists_and_mappings_become_values() -> None:
    options = GenerateOptions(
        bad_words=["a b", [1, np.int64(2)], (1, 2)],
        suppress_tokens=[3, 1, 3],
        forced_eos_token_id=[5, 6],
        logit_bias={"7": 1, np.int64(8): np.float32(-0.5)},
        stop_token_ids=[],
    )
    assert options.bad_words == ("a b", (1, 2))
    assert options.suppress_tokens == (3, 1)
    assert options.forced_eos_token_id == (5, 6)
    assert options.logit_bias == ((7, 1.0), (8, -0.5))
    assert options.stop_token_ids == ()
    assert GenerateOptions(bad_words="a").bad_words == ("a",)
    assert GenerateOptions(forced_eos_token_id=5).forced_eos_token_id == (5,)
    assert GenerateOptions.of(options, seed=1).given() == options.given() | {"seed": 1}
    assert hash(options) == hash(pickle.loads(pickle.dumps(options)))
    largest = dict.fromkeys(range(4096), 100.0)
    assert len(GenerateOptions(logit_bias=largest).logit_bias or ()) == 4096


def test_unknown_names() -> None:
    message = refused(max_tokens=3)
    assert message.startswith("unknown option 'max_tokens'; did you mean 'max_new_tokens'? known: ")
    assert all(name in message for name in GenerateOptions.model_fields)
    assert "did you mean 'top_k'" in refused(topk=3)
    assert "did you mean 'stop'" in refused(stop_strings="x")
    assert "did you mean 'num_return_sequences'" in refused(n=2)
    assert "did you mean 'bad_words'" in refused(bad_words_ids=[[1]])
    assert "did you mean" not in refused(zzz=1)
    assert refused(**{"a\nb": 1}).startswith(r"unknown option 'a\nb'; known")


def test_a_value_whose_repr_fails_is_refused_all_the_same() -> None:
    class Hostile:
        def __repr__(self) -> str:
            raise RuntimeError

    assert refused(seed=Hostile()).startswith("seed is a Hostile; allowed")


def test_sampling_options_beside_explicit_greedy() -> None:
    assert refused(do_sample=False, temperature=0.7) == (
        "do_sample is False, yet temperature is 0.7; allowed: do_sample=True, or no temperature"
    )
    refused(do_sample=False, top_k=5)
    refused(do_sample=False, top_p=0.5)
    GenerateOptions(do_sample=False, temperature=1, top_k=50, top_p=1.0, seed=3)
    GenerateOptions(do_sample=False, top_k=0, min_p=0, typical_p=1, num_return_sequences=1)
    refused(do_sample=False, min_p=0.1)
    refused(do_sample=False, typical_p=0.9)
    GenerateOptions(temperature=0.7)


def test_beams_beside_sampling_or_without_beams() -> None:
    assert refused(num_beams=4, typical_p=0.9) == (
        "typical_p is 0.9, yet num_beams is 4; allowed: num_beams=1, or no typical_p"
    )
    assert refused(num_beams=2, do_sample=True).startswith("do_sample is True, yet num_beams is 2")
    for name, value in {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1}.items():
        assert refused(**{"num_beams": 2, name: value}).startswith(f"{name} is {value}, yet num_b")
    assert refused(num_beams=1, length_penalty=2.0) == (
        "length_penalty is 2.0, yet num_beams is 1; allowed: num_beams of at least 2, or no "
        "length_penalty"
    )
    for name, value in {"early_stopping": "never", "num_beam_groups": 2}.items():
        assert refused(**{"num_beams": 1, name: value}).startswith(f"{name} is {value!r}, yet")
    for name, value in {
        "num_beams": 17,
        "num_beam_groups": 0,
        "length_penalty": INF,
        "early_stopping": "always",
        "diversity_penalty": -1.0,
    }.items():
        assert refused(**{name: value}).startswith(f"{name} is {value!r}; allowed: ")
    GenerateOptions(num_beams=4, top_k=50, temperature=1.0, top_p=1.0, do_sample=False)
    GenerateOptions(num_beams=1, length_penalty=1, early_stopping=False, num_beam_groups=1)


def test_options_are_values() -> None:
    options = GenerateOptions(max_new_tokens=3, stop="x")
    assert pickle.loads(pickle.dumps(options)) == options
    assert hash(options) == hash(GenerateOptions(max_new_tokens=3, stop=["x"]))
    with pytest.raises(ValueError):
        options.seed = 3  # type: ignore[misc]


# --- of, per_prompt


def test_of() -> None:
    base = GenerateOptions(top_k=3, do_sample=True)
    assert GenerateOptions.of(base) is base
    assert GenerateOptions.of() == GenerateOptions()
    assert GenerateOptions.of(None, seed=1) == GenerateOptions(seed=1)
    assert GenerateOptions.of({"seed": 1}, seed=2, top_k=None) == GenerateOptions(seed=2)
    assert GenerateOptions.of(base, top_k=9) == GenerateOptions(top_k=9, do_sample=True)
    with pytest.raises(OptionError, match="do_sample is False, yet top_k is 3"):
        GenerateOptions.of(base, do_sample=False)
    for bad in (5, "greedy", [("seed", 1)], {1: 2}):
        with pytest.raises(OptionError, match="allowed: GenerateOptions, or a mapping"):
            GenerateOptions.of(bad)  # type: ignore[arg-type]


def test_per_prompt() -> None:
    one = GenerateOptions(seed=1)
    assert per_prompt(one, 3, {}) == [one] * 3
    assert per_prompt(None, 2, {"seed": 1}) == [one] * 2
    assert per_prompt([one, {"top_k": 2}, None], 3, {"seed": 4}) == [
        GenerateOptions(seed=4),
        GenerateOptions(seed=4, top_k=2),
        GenerateOptions(seed=4),
    ]
    assert per_prompt([], 0, {}) == []
    with pytest.raises(OptionError, match="2 entries for 3 prompts"):
        per_prompt([one, one], 3, {})
    with pytest.raises(OptionError, match="unknown option 'sed'; did you mean 'seed'"):
        per_prompt(None, 1, {"sed": 3})
    with pytest.raises(OptionError, match="allowed: GenerateOptions"):
        per_prompt("abc", 3, {})  # type: ignore[arg-type]


def test_completion_is_frozen() -> None:
    completion = Completion("a", [1], "b", [2], "eos")
    assert completion.error is None
    assert completion.logprobs is None and completion.cumulative_logprob is None
    with pytest.raises(AttributeError):
        completion.text = "c"  # type: ignore[misc]
