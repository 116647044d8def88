"""FasterTransformer's door: its signatures, its parameters' meaning, and whole old scripts."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

import lmi_multi
from lmi_multi import fastertransformer as ft
from lmi_multi.errors import LmiError, OptionError
from lmi_multi.fastertransformer import parameters as known
from tests.checkpoint.ft_writer import write
from tests.families import FAMILIES

PROMPTS = ["one", "a longer prompt", "two"]
VOCAB = 259  # ByT5's without extra ids


@pytest.fixture(scope="module", params=["t5", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random byte-level checkpoints."""
    root = tmp_path_factory.mktemp("ft")
    for name in ("t5", "gpt2"):
        FAMILIES[name].save(root / name, vocab=VOCAB)
        ByT5Tokenizer(extra_ids=0).save_pretrained(root / name)
    return {name: root / name for name in ("t5", "gpt2")}


def opened(folder: Path, **keywords: Any) -> Any:
    return ft.init_inference(str(folder), 1, 1, "fp32", backend="cpu", **keywords)


@pytest.fixture(scope="module")
def t5(folders: dict[str, Path]) -> Iterator[ft.T5Model]:
    with opened(folders["t5"]) as handle:
        yield handle


@pytest.fixture(scope="module")
def gpt(folders: dict[str, Path]) -> Iterator[ft.GPTModel]:
    with opened(folders["gpt2"], max_tokens=100) as handle:
        yield handle


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every prompt that reached `Model.generate` while the test ran."""
    seen: list[dict[str, Any]] = []
    generate = lmi_multi.Model.generate

    def watched(self: lmi_multi.Model, prompts: Any, options: Any, **keywords: Any) -> Any:
        seen.extend(options)
        return generate(self, prompts, options, **keywords)

    monkeypatch.setattr(lmi_multi.Model, "generate", watched)
    return seen


# --- signatures -----------------------------------------------------------------------------------


def signature(function: Any) -> dict[str, Any]:
    """Names and defaults, `...` where there is none."""
    empty = inspect.Parameter.empty
    return {
        name: ... if parameter.default is empty else parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
    }


def test_signatures() -> None:
    first = {"model": ..., "tensor_parallel_degree": ..., "pipeline_parallel_degree": ...}
    assert signature(ft.init_inference) == first | {
        "dtype": "fp32",
        "use_triton": None,
        "do_streaming": False,
        "is_peft": False,
        "kwargs": ...,
    }
    assert signature(ft.save_checkpoint) == first | {
        "save_mp_checkpoint_path": ...,
        "dtype": "fp32",
        "kwargs": ...,
    }
    assert signature(ft.T5Model.pipeline_generate) == {
        "self": ...,
        "inputs": ...,
        "parameters": ...,
    }
    assert signature(ft.GPTModel.pipeline_generate) == {
        "self": ...,
        "inputs": ...,
        "batch_size": 1,
        "output_len": 32,
        "beam_width": 1,
        "skip_end_tokens": True,
        "detokenize": True,
        "parameters": ...,
    }


def test_defaults() -> None:
    assert dict(known.T5_DEFAULTS) == {
        "inputs_embeds": None,
        "beam_width": 1,
        "max_seq_len": 200,
        "top_k": 1,
        "top_p": 0.0,
        "beam_search_diversity_rate": 0.0,
        "temperature": 1.0,
        "len_penalty": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": None,
        "min_length": 0,
        "random_seed": 0,
        "is_return_output_log_probs": False,
        "is_return_cum_log_probs": False,
        "is_return_cross_attentions": False,
        "bad_words_list": None,
        "stop_words_list": None,
    }
    shared = {name: known.T5_DEFAULTS[name] for name in known.GPT_DEFAULTS if "return" not in name}
    own = {"return_output_length": 0, "return_cum_log_probs": 0}
    assert dict(known.GPT_DEFAULTS) == shared | own


def test_every_default_may_be_given(t5: ft.T5Model, gpt: ft.GPTModel) -> None:
    assert t5.pipeline_generate(PROMPTS, **known.T5_DEFAULTS) == t5.pipeline_generate(PROMPTS)
    assert gpt.pipeline_generate(PROMPTS, 3, 32, 1, True, True, **known.GPT_DEFAULTS) == (
        gpt.pipeline_generate(PROMPTS)
    )


def test_unknown_arguments_are_type_errors(t5: ft.T5Model, gpt: ft.GPTModel) -> None:
    for call in (
        lambda: t5.pipeline_generate(PROMPTS, max_new_tokens=3),
        lambda: gpt.pipeline_generate(PROMPTS, max_seq_len=3),
        lambda: t5.stream_generate(PROMPTS, output_len=3),
        lambda: gpt.stream_generate(PROMPTS, nonsense=3),
        lambda: ft.init_inference("model", 1, 1, nonsense=3),
        lambda: ft.save_checkpoint("model", 1, 1, "out", backend="cpu"),
        lambda: ft.init_inference("model", 1),
    ):
        with pytest.raises(TypeError):
            call()


# --- old scripts ----------------------------------------------------------------------------------

T5_SCRIPT = """
import json
import fastertransformer as ft

model = ft.init_inference("{folder}", 1, 1, dtype="fp32")
texts = ["translate: one", "translate: two"]
first = model.pipeline_generate(texts)
short = model.pipeline_generate(
    texts, max_seq_len=5, top_k=1, temperature=0.7, repetition_penalty=1.2, random_seed=3
)
try:
    model.pipeline_generate(texts, max_length=5)
    refused = False
except TypeError:
    refused = True
print(json.dumps([first, short, refused]))
"""
GPT_SCRIPT = """
import json
import fastertransformer as ft

ft.save_checkpoint("{folder}", 1, 1, "{folder}-saved", dtype="fp32")
model = ft.init_inference("{folder}-saved", 1, 1, "fp32")
texts = ["Amazon is ", "FasterTransformer is"]
first = model.pipeline_generate(texts)
ids = model.pipeline_generate(texts, batch_size=2, output_len=5, detokenize=False, top_k=0)
sampled = model.pipeline_generate(texts, 2, 6, 1, top_k=5, top_p=0.9, random_seed=7)
print(json.dumps([first, ids, sampled]))
"""


def run_script(text: str, folder: Path, tmp_path: Path) -> Any:
    """What an old script prints once its import line has been changed, and nothing else."""
    text = text.replace(
        "import fastertransformer as ft", "from lmi_multi import fastertransformer as ft"
    )
    script = tmp_path / "script.py"
    script.write_text(text.format(folder=folder))
    environment = os.environ | {"LMI_MULTI_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_an_old_t5_script(folders: dict[str, Path], t5: ft.T5Model, tmp_path: Path) -> None:
    first, short, refused = run_script(T5_SCRIPT, folders["t5"], tmp_path)
    texts = ["translate: one", "translate: two"]
    assert refused
    assert first == t5.pipeline_generate(texts)
    expected = t5.model.generate(
        texts, max_new_tokens=5, do_sample=False, repetition_penalty=1.2, seed=3
    )
    assert short == [completion.text for completion in expected]


def test_an_old_gpt_script(folders: dict[str, Path], gpt: ft.GPTModel, tmp_path: Path) -> None:
    first, ids, sampled = run_script(GPT_SCRIPT, folders["gpt2"], tmp_path)
    texts = ["Amazon is ", "FasterTransformer is"]
    assert first == gpt.pipeline_generate(texts)
    expected = gpt.model.generate(texts, max_new_tokens=5, do_sample=False)
    assert ids == [" ".join(str(i) for i in c.token_ids if i != 2) for c in expected]
    assert len(sampled) == 2


# --- parameters -----------------------------------------------------------------------------------


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


# --- words ----------------------------------------------------------------------------------------


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


# --- results --------------------------------------------------------------------------------------


def test_inputs(t5: ft.T5Model, gpt: ft.GPTModel) -> None:
    for handle in (t5, gpt):
        texts = handle.pipeline_generate(PROMPTS)
        assert [type(text) for text in texts] == [str] * 3
        assert handle.pipeline_generate(PROMPTS[1]) == texts[1:2]
        assert handle.pipeline_generate(tuple(PROMPTS)) == texts
        ids = [handle.tokenizer.encode(prompt) for prompt in PROMPTS]
        assert handle.pipeline_generate(ids) == texts
        assert handle.pipeline_generate([]) == []
        assert handle.get_tokenizer() is handle.tokenizer


def test_end_tokens_of_gpt(gpt: ft.GPTModel) -> None:
    [end] = gpt.model.defaults.eos_token_ids
    options = {"top_k": 0, "top_p": 1.0, "output_len": 80, "temperature": 3.0}
    for seed in range(50):
        [kept] = gpt.pipeline_generate(
            "one", skip_end_tokens=False, detokenize=False, random_seed=seed, **options
        )
        if kept.endswith(f" {end}"):
            break
    else:
        pytest.fail("no seed of 50 ends")
    [left] = gpt.pipeline_generate("one", detokenize=False, random_seed=seed, **options)
    assert kept == f"{left} {end}"
    [text] = gpt.pipeline_generate("one", skip_end_tokens=False, random_seed=seed, **options)
    assert text.endswith(gpt.tokenizer.decode([end]))  # a special token, and yet it is shown


def test_log_probabilities_of_t5(t5: ft.T5Model) -> None:
    texts = t5.pipeline_generate(PROMPTS, max_seq_len=6)
    same, each, total = t5.pipeline_generate(
        PROMPTS, max_seq_len=6, is_return_output_log_probs=True, is_return_cum_log_probs=True
    )
    assert same == texts
    completions = t5.model.generate(PROMPTS, max_new_tokens=6, do_sample=False)
    scores = t5.model.score(PROMPTS, [c.token_ids for c in completions])
    for own, expected, sum_ in zip(each, scores, total, strict=True):
        assert np.allclose(own, expected, atol=1e-5)
        assert sum_ == pytest.approx(sum(own))
    flags = {"max_seq_len": 6, "is_return_cum_log_probs": True}
    assert t5.pipeline_generate(PROMPTS, **flags) == (texts, total)


def test_further_results_of_gpt(gpt: ft.GPTModel) -> None:
    texts, lengths, total = gpt.pipeline_generate(
        PROMPTS, output_len=5, return_output_length=1, return_cum_log_probs=1
    )
    assert texts == gpt.pipeline_generate(PROMPTS, output_len=5)
    completions = gpt.model.generate(PROMPTS, max_new_tokens=5, do_sample=False, logprobs=0)
    assert lengths == [len(c.token_ids) for c in completions]
    assert total == pytest.approx([c.cumulative_logprob for c in completions])


def test_beams(t5: ft.T5Model, gpt: ft.GPTModel) -> None:
    beams = {"num_beams": 3, "length_penalty": 0.6, "early_stopping": True, "do_sample": False}
    best = t5.model.generate(PROMPTS, max_new_tokens=8, **beams)
    given = {"beam_width": 3, "len_penalty": 0.6}
    assert t5.pipeline_generate(PROMPTS, max_seq_len=8, **given) == [c.text for c in best]
    all_ = gpt.model.generate(PROMPTS, max_new_tokens=8, num_return_sequences=3, **beams)
    flat = gpt.pipeline_generate(PROMPTS, output_len=8, detokenize=False, **given)
    assert flat == [" ".join(str(i) for i in c.token_ids if i != 2) for c in all_]
    assert len(flat) == 9


def test_beams_of_the_models_file_do_not_count(t5: ft.T5Model) -> None:
    before = t5.model._reader
    t5.model._reader = replace(before, defaults=replace(before.defaults, num_beams=4))
    try:
        assert t5.model.generate(PROMPTS[:1])[0].score is not None
        wanted = {"max_seq_len": 8}
        assert t5.pipeline_generate(PROMPTS, **wanted) == t5.pipeline_generate(
            PROMPTS, **wanted, beam_width=None
        )
        greedy = t5.model.generate(PROMPTS, max_new_tokens=8, num_beams=1)
        assert t5.pipeline_generate(PROMPTS, **wanted) == [c.text for c in greedy]
    finally:
        t5.model._reader = before


def test_failed_rows_are_errors(t5: ft.T5Model, monkeypatch: pytest.MonkeyPatch) -> None:
    completions = t5.model.generate(PROMPTS, max_new_tokens=2)
    broken = lmi_multi.Completion(**{**vars(completions[1]), "error": "not finite"})
    results = [completions[0], broken, completions[2]]
    monkeypatch.setattr(t5.model, "generate", lambda *_: results)
    with pytest.raises(LmiError, match="prompt 1: not finite"):
        t5.pipeline_generate(PROMPTS)


# --- streams --------------------------------------------------------------------------------------


def test_streams_make_up_the_texts(t5: ft.T5Model, gpt: ft.GPTModel) -> None:
    for handle, name in ((t5, "max_seq_len"), (gpt, "output_len")):
        sampling = {"top_k": 40, "random_seed": 3, "temperature": 2.0}
        steps = list(handle.stream_generate(PROMPTS, [9, 20, 14], "left", **sampling))
        assert all(len(step) == 3 for step in steps)
        completions = handle.model.generate(
            PROMPTS,
            [{"max_new_tokens": n} for n in (9, 20, 14)],
            do_sample=True,
            top_k=40,
            seed=3,
            temperature=2.0,
            top_p=1.0,
        )
        assert [*map("".join, zip(*steps, strict=True))] == [c.text for c in completions]
        assert len(steps) <= max(len(c.token_ids) for c in completions) + 1
        named = {name: [9, 20, 14], "runtime_top_k": np.full((3, 1), 40)}
        again = handle.stream_generate(PROMPTS, random_seed=3, temperature=2.0, **named)
        assert [*map("".join, zip(*again, strict=True))] == [c.text for c in completions]


def test_closing_a_stream_frees_its_places(gpt: ft.GPTModel) -> None:
    expected = gpt.pipeline_generate(PROMPTS)
    steps = gpt.stream_generate(PROMPTS, 60)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert gpt.model._engine.scheduler.idle
    assert gpt.pipeline_generate(PROMPTS) == expected


def test_what_streams_refuse(t5: ft.T5Model, gpt: ft.GPTModel) -> None:
    for handle in (t5, gpt):
        assert list(handle.stream_generate([])) == []
        with pytest.raises(OptionError, match="padding_side is 'up'"):
            handle.stream_generate(PROMPTS, 3, "up")
        with pytest.raises(TypeError, match="under two names"):
            handle.stream_generate(PROMPTS, top_k=3, runtime_top_k=4)
        with pytest.raises(OptionError, match="top_k is -1"):
            handle.stream_generate(PROMPTS, top_k=-1)  # before the first step
    with pytest.raises(TypeError, match="under two names"):
        t5.stream_generate(PROMPTS, 3, max_seq_len=4)
    with pytest.raises(OptionError, match="a stream yields texts only"):
        gpt.stream_generate(PROMPTS, return_output_length=1)


# --- loading and saving ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"use_triton": True}, "use_triton is set"),
        ({"is_peft": True}, "is_peft is set"),
        ({"pipeline_parallel_degree": 0}, "pipeline_parallel_degree is 0, must be"),
        ({"tensor_parallel_degree": "2"}, "tensor_parallel_degree is '2', must be"),
        ({"tensor_parallel_degree": True}, "tensor_parallel_degree is True, must be"),
        ({"dtype": "int4"}, "dtype is 'int4', must be one of fp32, fp16, bf16, int8"),
    ],
)
def test_refused_arguments(
    given: dict[str, Any], match: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    first = {"tensor_parallel_degree": 1, "pipeline_parallel_degree": 1}
    with pytest.raises(OptionError, match=match):
        ft.init_inference(folders["gpt2"], **(first | given))
    with pytest.raises(OptionError, match=match):
        ft.save_checkpoint(
            folders["gpt2"], save_mp_checkpoint_path=tmp_path / "out", **(first | given)
        )
    assert not (tmp_path / "out").exists()


def test_do_streaming_is_a_switch(folders: dict[str, Path]) -> None:
    with opened(folders["gpt2"], do_streaming=True, lib_path="/opt", use_triton=False) as handle:
        assert isinstance(handle, ft.GPTModel)
    with pytest.raises(OptionError, match="do_streaming is 'yes'"):
        opened(folders["gpt2"], do_streaming="yes")


def test_encoders_generate_nothing(tmp_path: Path) -> None:
    FAMILIES["bert"].save(tmp_path)
    with pytest.raises(OptionError, match="model is a bert"):
        opened(tmp_path)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_saved_checkpoints_load(
    family: str, dtype: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    ft.save_checkpoint(str(folders[family]), 2, 1, str(saved), dtype, num_convert_process=4)
    assert lmi_multi.checkpoint.artifact.Artifact.open(saved).tensor_parallel == 2
    direct = ft.init_inference(folders[family], 1, 1, dtype, backend="cpu")
    with direct, ft.init_inference(saved, 1, 1, dtype, backend="cpu") as loaded:
        narrow = {"fp32": "fp32", "bf16": "bf16", "int8": "bf16" if family == "t5" else "fp16"}
        assert loaded.model.artifact.dtype == narrow[dtype]
        assert loaded.model.artifact.quantize == ("int8" if dtype == "int8" else None)
        expected = direct.pipeline_generate(PROMPTS, top_k=0)
        assert loaded.pipeline_generate(PROMPTS, top_k=0) == expected


def test_another_dtype_than_saved_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    ft.save_checkpoint(folders["gpt2"], 1, 1, tmp_path / "saved", "fp16")
    with pytest.raises(OptionError, match="dtype is 'fp32', but the artifact"):
        opened(tmp_path / "saved")


def test_fastertransformers_own_files(
    family: str, folders: dict[str, Path], t5: ft.T5Model, gpt: ft.GPTModel, tmp_path: Path
) -> None:
    write(FAMILIES[family].build(vocab=VOCAB), tmp_path, gpus=2)
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path)
    expected = (t5 if family == "t5" else gpt).pipeline_generate(PROMPTS)
    with opened(tmp_path) as handle:
        assert handle.pipeline_generate(PROMPTS) == expected


def test_without_a_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    FAMILIES["gpt2"].save(tmp_path / "gpt2")
    with opened(tmp_path / "gpt2") as handle:
        with pytest.raises(OptionError, match="has no tokenizer"):
            handle.pipeline_generate([[5, 6]])
        [text] = handle.pipeline_generate([[5, 6]], detokenize=False, output_len=4)
        assert all(part.isdigit() for part in text.split())
    FAMILIES["t5"].save(tmp_path / "t5")
    with opened(tmp_path / "t5") as handle, pytest.raises(OptionError, match="no tokenizer"):
        handle.pipeline_generate([[5, 6]])
