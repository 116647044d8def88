"""How long an answer may be, against Hugging Face's `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lmi_multi.defaults import GenerationDefaults
from lmi_multi.options import GenerateOptions
from tests.test_defaults import resolve

LENGTHS: list[dict[str, Any]] = [
    {},
    {"max_length": 9},
    {"max_new_tokens": 3},
    {"max_length": 9, "max_new_tokens": 4},
    {"min_length": 8, "max_new_tokens": 12},
    {"min_new_tokens": 5, "max_new_tokens": 12},
    {"min_new_tokens": 2, "min_length": 9, "max_new_tokens": 12},
]


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    """Emits token 1, its end token, unless that is banned: then 0."""
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=4, n_embd=4, n_layer=1, n_head=1, n_positions=64)
    ).eval()
    return biased(model)


@pytest.fixture(scope="module")
def t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=4, d_model=4, d_kv=4, d_ff=4, num_layers=1, num_heads=1, decoder_start_token_id=0
    )
    return biased(T5ForConditionalGeneration(config).eval())


def biased(model: Any) -> Any:
    def prefer_end(module: object, args: object, logits: torch.Tensor) -> torch.Tensor:
        return torch.tensor([2.0, 3.0, 0.0, 0.0]).expand(logits.shape)

    model.lm_head.register_forward_hook(prefer_end)
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
@pytest.mark.parametrize("end", [1, 3])
@pytest.mark.parametrize("given", LENGTHS)
@pytest.mark.parametrize("filed", [{}, {"max_length": 11}, {"min_length": 7, "max_length": 11}])
def test_lengths_equal_hugging_face(
    kind: str, end: int, given: dict[str, Any], filed: dict[str, Any], request: Any
) -> None:
    model = request.getfixturevalue(kind)
    used = 5 if kind == "gpt2" else 1
    model.generation_config = GenerationConfig(
        eos_token_id=end, pad_token_id=0, decoder_start_token_id=0, **filed
    )
    theirs = model.generate(torch.tensor([[2, 3, 2, 3, 2]]), **given)[0, used:].tolist()
    found = GenerationDefaults(eos_token_ids=(end,), options=GenerateOptions(**filed))
    got = resolve(found, decoder_only=kind == "gpt2", **given)
    expected = got.max_new_tokens if end == 3 else got.min_new_tokens + 1
    assert len(theirs) == min(expected, got.max_new_tokens)
