"""FasterTransformer's signatures: its names, its defaults, and no others."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from lmi_multi import fastertransformer as ft
from lmi_multi.fastertransformer import parameters as known

from .tiny import PROMPTS


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
