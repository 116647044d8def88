"""What a call gives back, as a whole and as a stream, beside `Model.generate`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import lmi_multi
from lmi_multi import fastertransformer as ft
from lmi_multi.errors import LmiError, OptionError

from .tiny import PROMPTS

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
