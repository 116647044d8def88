"""Bad words and stop words, in each of FasterTransformer's forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lmi_multi import fastertransformer as ft
from lmi_multi.fastertransformer import parameters as known

from .tiny import PROMPTS


def word_array(lists: list[list[list[int]]]) -> np.ndarray[Any, Any]:
    """The original's form: ids of all words of a prompt, and the place after each word."""
    size = max(sum(map(len, words)) for words in lists)
    result = np.zeros((len(lists), 2, size), dtype=np.int32)
    result[:, 1] = -1
    for row, words in zip(result, lists, strict=True):
        flat = [token for word in words for token in word]
        row[0, : len(flat)] = flat
        row[1, : len(words)] = np.cumsum([len(word) for word in words])
    return result


def test_words_in_every_form(t5: ft.T5Model, asked: list[dict[str, Any]]) -> None:
    def bad(value: Any) -> list[Any]:
        asked.clear()
        t5.pipeline_generate(PROMPTS, max_seq_len=2, bad_words_list=value)
        return [own.get("bad_words") for own in asked]

    assert bad(["ab", "c"]) == [["ab", "c"]] * 3
    assert bad([["a"], ["b"], []]) == [["a"], ["b"], None]
    assert bad([[7, 8], [9]]) == [[(7, 8), (9,)]] * 3
    assert bad([[[7, 8]], [[9]], []]) == [[(7, 8)], [(9,)], None]
    assert bad(word_array([[[7, 8], [9]]])) == [[(7, 8), (9,)]] * 3
    assert bad(word_array([[[7, 8], [9]]])[0]) == [[(7, 8), (9,)]] * 3
    each = word_array([[[7, 8], [9]], [[10]], [[11, 12, 13]]])
    assert bad(torch.from_numpy(each)) == [[(7, 8), (9,)], [(10,)], [(11, 12, 13)]]
    assert bad([]) == bad(None) == [None] * 3


def test_bad_words_never_come(t5: ft.T5Model) -> None:
    [plain] = t5.model.generate("one", max_new_tokens=20, do_sample=False)
    token = plain.token_ids[3]
    for value in ([[token]], word_array([[[token]]])):
        options = known.options({**known.T5_DEFAULTS, "bad_words_list": value}, 1, t5.tokenizer)
        [banned] = t5.model.generate("one", options[0] | {"max_new_tokens": 20})
        assert token not in banned.token_ids


def test_stop_words(gpt: ft.GPTModel) -> None:
    [plain] = gpt.model.generate(PROMPTS[0], max_new_tokens=30, do_sample=False)
    assert plain.text is not None
    stop = plain.text[3:5]
    [text] = gpt.pipeline_generate(PROMPTS[0], stop_words_list=[stop])
    assert text == plain.text[: plain.text.index(stop)]
    encoded = list(stop.encode())
    ids = [byte + 3 for byte in encoded]  # ByT5's first three are special
    [same] = gpt.pipeline_generate(PROMPTS[0], stop_words_list=word_array([[ids]]))
    assert same == text
    token = plain.token_ids[4]
    [text] = gpt.pipeline_generate(
        PROMPTS[0], stop_words_list=[[token]], detokenize=False, output_len=30
    )
    assert text.split().index(str(token)) == plain.token_ids.index(token)
