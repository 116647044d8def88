"""What FasterTransformer's parameters mean here, and which values are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lmi_multi import fastertransformer as ft
from lmi_multi.errors import OptionError

from .tiny import PROMPTS


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"do_sample": False}),
        ({"top_k": 0, "top_p": 0}, {"do_sample": False}),
        ({"top_k": None, "top_p": None}, {"do_sample": False}),
        ({"top_k": 1, "top_p": 0.9, "temperature": 0.5}, {"do_sample": False}),
        ({"top_k": 4}, {"do_sample": True, "top_k": 4, "top_p": 1.0, "temperature": 1.0}),
        (
            {"top_k": 0, "top_p": 0.9, "temperature": 0.5},
            {"do_sample": True, "top_k": 0, "top_p": 0.9, "temperature": 0.5},
        ),
        (
            {"top_k": 7, "top_p": 0.5},
            {"do_sample": True, "top_k": 7, "top_p": 0.5, "temperature": 1.0},
        ),
    ],
)
def test_greedy_or_not(
    given: dict[str, Any], expected: dict[str, Any], t5: ft.T5Model, asked: list[dict[str, Any]]
) -> None:
    t5.pipeline_generate("one", max_seq_len=2, **given)
    [options] = asked
    names = ("do_sample", "top_k", "top_p", "temperature")
    assert {name: options[name] for name in names if name in options} == expected


def test_lengths_and_the_rest(
    t5: ft.T5Model, gpt: ft.GPTModel, asked: list[dict[str, Any]]
) -> None:
    t5.pipeline_generate(["one"])
    t5.pipeline_generate(["one"], max_seq_len=7, min_length=2, random_seed=5)
    gpt.pipeline_generate(["one"])
    gpt.pipeline_generate(["one"], output_len=9, repetition_penalty=1.5, presence_penalty=0.5)
    assert [own["max_new_tokens"] for own in asked] == [200, 7, 32, 9]
    assert [own["min_new_tokens"] for own in asked] == [0, 2, 0, 0]
    assert [own["seed"] for own in asked] == [0, 5, 0, 0]
    assert [own["repetition_penalty"] for own in asked] == [1.0, 1.0, 1.0, 1.5]
    assert asked[3]["presence_penalty"] == 0.5


def test_lengths_are_honoured(t5: ft.T5Model) -> None:
    for length in (1, 9):
        [text] = t5.pipeline_generate(["one"], max_seq_len=length)
        [completion] = t5.model.generate(["one"], max_new_tokens=length, do_sample=False)
        assert text == completion.text
        assert len(completion.token_ids) <= length


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_values_for_each_prompt(
    make: Any, t5: ft.T5Model, gpt: ft.GPTModel, asked: list[dict[str, Any]]
) -> None:
    t5.pipeline_generate(PROMPTS, max_seq_len=make([2, 3, 4]), top_k=make([1, 4, 0]))
    gpt.pipeline_generate(PROMPTS, output_len=make([2, 3, 4]), random_seed=make([9]))
    assert [own["max_new_tokens"] for own in asked] == [2, 3, 4] * 2
    assert [own["do_sample"] for own in asked] == [False, True, False] + [False] * 3
    assert [own["seed"] for own in asked] == [0, 0, 0, 9, 9, 9]


def test_one_seed_gives_the_same_texts(gpt: ft.GPTModel) -> None:
    def draw(seed: int) -> Any:
        return gpt.pipeline_generate(PROMPTS, output_len=12, top_k=50, random_seed=seed)

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"max_seq_len": 0}, "max_seq_len is 0; allowed: an integer, at least 1"),
        ({"max_seq_len": [3, 4]}, "max_seq_len has 2 values for 3 prompts"),
        ({"top_k": -1}, "top_k is -1; allowed"),
        ({"top_k": 2.5}, "top_k is 2.5; allowed"),
        ({"top_p": 1.5}, "top_p is 1.5; allowed"),
        ({"top_p": False}, "top_p is False"),
        ({"temperature": 0}, "temperature is 0; allowed"),
        ({"temperature": float("nan")}, "temperature is nan; allowed"),
        ({"random_seed": -1}, "random_seed is -1; allowed"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; allowed"),
        ({"min_length": -1}, "min_length is -1; allowed"),
        ({"min_length": 300}, "min_new_tokens is 300"),
        ({"beam_width": 0}, "beam_width is 0"),
        ({"beam_width": 1.0}, r"beam_width is 1\.0"),
        ({"inputs_embeds": [[1.0]]}, "inputs_embeds is set"),
        ({"is_return_cross_attentions": True}, "is_return_cross_attentions is set"),
        ({"is_return_cum_log_probs": 2}, "is_return_cum_log_probs is 2"),
        ({"bad_words_list": "word"}, "bad_words_list is 'word'; allowed: a list"),
        ({"bad_words_list": [3]}, "bad_words_list holds the word 3"),
        ({"bad_words_list": [["a"], ["b"]]}, "bad_words_list has 2 lists for 3 prompts"),
        ({"stop_words_list": np.zeros((3, 3, 1), int)}, r"array of shape \[3, 3, 1\]"),
        ({"stop_words_list": np.array([[1, 2], [3, -1]])}, "word end 3 after 0, with 2"),
    ],
)
def test_invalid_values_are_refused_by_name(
    given: dict[str, Any], match: str, t5: ft.T5Model
) -> None:
    with pytest.raises(OptionError, match=match):
        t5.pipeline_generate(PROMPTS, **given)


def test_diversity_of_beams_is_refused(t5: ft.T5Model) -> None:
    one = t5.pipeline_generate("one", beam_search_diversity_rate=0.5, max_seq_len=3)
    assert one == t5.pipeline_generate("one", max_seq_len=3)  # with one beam it means nothing
    with pytest.raises(OptionError, match="beam_search_diversity_rate is set"):
        t5.pipeline_generate(PROMPTS, beam_width=2, beam_search_diversity_rate=[0, 0.5, 0])
