"""What a step says about the next: hints that executors may begin it by, so they must be true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lmi_multi.defaults import GenerationDefaults
from lmi_multi.errors import OptionError
from lmi_multi.ops.rules import History
from lmi_multi.options import GenerateOptions
from lmi_multi.resolved import Resolved

OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "min_new_tokens": st.integers(0, 6),
    "do_sample": st.booleans(),
    "temperature": st.floats(0.1, 2),
    "top_k": st.integers(1, 9),
    "top_p": st.floats(0.1, 1),
    "seed": st.integers(0, 9),
    "suppress_tokens": st.lists(st.integers(5, 9), max_size=3),
    "logit_bias": st.dictionaries(st.integers(0, 9), st.floats(-2, 2), max_size=2),
    "repetition_penalty": st.sampled_from([1.0, 1.5]),
    "encoder_repetition_penalty": st.sampled_from([1.0, 1.5]),
    "presence_penalty": st.sampled_from([0.0, 0.5]),
    "frequency_penalty": st.sampled_from([0.0, 0.5]),
    "no_repeat_ngram_size": st.integers(0, 3),
    "bad_words": st.sampled_from([[], [[3, 4]], [[2]]]),
    "forced_bos_token_id": st.sampled_from([None, 3]),
    "forced_eos_token_id": st.sampled_from([None, 1]),
    "stop_token_ids": st.lists(st.integers(5, 9), max_size=2),
    "logprobs": st.sampled_from([None, 0, 3]),
    "ignore_eos": st.booleans(),
}


def resolved(chosen: dict[str, Any]) -> Resolved:
    defaults = GenerationDefaults(eos_token_ids=(1,), decoder_start_token_id=0)
    options = GenerateOptions(**{"max_new_tokens": 8, **chosen})
    return defaults.resolve(options, prompt_tokens=3, decoder_only=False, limit=64)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(OPTIONS)), unique=True, max_size=4).flatmap(
        lambda names: st.fixed_dictionaries({name: OPTIONS[name] for name in names})
    ),
    st.lists(st.integers(2, 9), min_size=8, max_size=8),
    st.integers(0, 3),
)
def test_a_hint_is_what_comes(chosen: dict[str, Any], tokens: list[int], stream: int) -> None:
    try:
        options = resolved(chosen)
    except OptionError:  # options that contradict each other
        assume(False)
    sofar = [0]
    for step in range(1, 8):
        hint = options.ahead(step, History(sofar, 1, [7, 8, 9]), stream)
        sofar.append(tokens[step - 1])  # only now
        row = options.row(step, History([0, *tokens[:step]], 1, [7, 8, 9]), stream)
        assert hint is not None and hint == row
        assert (hint.edit, hint.bans) == (row.edit, row.bans)
    assert options.ahead(8, History(sofar, 1, [7, 8, 9]), stream) is None


@pytest.mark.parametrize("chosen", [{}, {"min_new_tokens": 5}, {"do_sample": True, "top_k": 3}])
def test_plain_options_have_hints(chosen: dict[str, Any]) -> None:
    options: Callable[[int], Any] = resolved(chosen).ahead
    assert None not in [options(step) for step in range(1, 8)]
