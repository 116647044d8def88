"""What a model's files say about generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    GenerationConfig,
)

from lmi_multi import generation_config
from lmi_multi.defaults import GenerationDefaults
from lmi_multi.errors import CheckpointError
from lmi_multi.options import GenerateOptions

NAN, INF = float("nan"), float("inf")


def read(folder: Path, generation: Any = None, config: Any = None) -> GenerationDefaults:
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text)
    return GenerationDefaults.read(folder)


def test_token_ids(tmp_path: Path) -> None:
    found = read(tmp_path, {"eos_token_id": [2, 5, 2], "pad_token_id": 0, "bos_token_id": 1})
    assert found.eos_token_ids == (2, 5)
    assert (found.pad_token_id, found.bos_token_id) == (0, 1)
    assert found.decoder_start_token_id == 1  # as Hugging Face: bos where there is no other
    assert found.options == GenerateOptions() and found.unsupported == ()
    found = read(tmp_path, {"eos_token_id": 7, "decoder_start_token_id": 3, "pad_token_id": -1})
    assert (found.eos_token_ids, found.decoder_start_token_id) == ((7,), 3)
    assert found.pad_token_id is None


def test_generation_config_replaces_all_of_config(tmp_path: Path) -> None:
    config = {"eos_token_id": 9, "max_length": 40, "do_sample": True, "temperature": 0.5}
    found = read(tmp_path, None, config)
    assert (found.eos_token_ids, found.source) == ((9,), "config.json")
    assert found.options == GenerateOptions(max_length=40, do_sample=True, temperature=0.5)
    found = read(tmp_path, {"bos_token_id": 4}, config)
    assert (found.eos_token_ids, found.bos_token_id) == ((), 4)
    assert found.options == GenerateOptions()


def test_no_files_at_all(tmp_path: Path) -> None:
    assert GenerationDefaults.read(tmp_path) == GenerationDefaults()


LEGACY: list[dict[str, Any]] = [
    {"model_type": "gpt2", "eos_token_id": 3, "max_length": 30, "top_k": None},
    {"is_encoder_decoder": True, "decoder": {"eos_token_id": 8, "top_k": 7}, "top_k": 9},
    {"text_config": {"bos_token_id": 8, "min_length": 2}, "eos_token_id": [1, 2]},
]


@pytest.mark.parametrize("config", LEGACY)
def test_legacy_settings_equal_hugging_face(tmp_path: Path, config: dict[str, Any]) -> None:
    theirs = GenerationConfig.from_model_config(json.loads(json.dumps(config)))
    ours = read(tmp_path, None, config)
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == tuple(eos if isinstance(eos, list) else [eos])
    assert ours.bos_token_id == theirs.bos_token_id
    for name in ("max_length", "min_length", "top_k"):
        assert getattr(ours.options, name) == getattr(theirs, name)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("{", "generation_config.json cannot be read as JSON"),
        ("[" * 100_000, "generation_config.json cannot be read as JSON"),
        ([1], "must hold a JSON object, not list"),
        ({"eos_token_id": "2"}, "eos_token_id is '2', must be a token id or a list of them"),
        ({"eos_token_id": [1, True]}, "eos_token_id"),
        ({"pad_token_id": 1.5}, "pad_token_id"),
        ({"top_k": "many"}, "top_k is 'many'; allowed"),
        ({"do_sample": True, "temperature": 0}, "temperature is 0; allowed"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; allowed"),
        ({"top_p": NAN}, "top_p is nan; allowed"),
        ({"repetition_penalty": -1}, "repetition_penalty is -1; allowed"),
        ({"bad_words_ids": [5]}, "bad_words is [5]; allowed"),
        ({"suppress_tokens": ["a"]}, "suppress_tokens is ['a'], must be a token id or a list"),
    ],
)
def test_malformed_files(tmp_path: Path, content: Any, cause: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert str(tmp_path / "generation_config.json") in message
    assert cause in message and "\n" not in message


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="cannot be read"):
        GenerationDefaults.read(tmp_path)


def test_unsupported_settings_are_named(tmp_path: Path) -> None:
    neutral = {
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "suppress_tokens": [],
        "bad_words_ids": None,
        "diversity_penalty": 0.0,
        "length_penalty": 2.0,  # of beams
        "early_stopping": True,
        "transformers_version": "4.30.0",
        "use_cache": True,
    }
    assert read(tmp_path, neutral).unsupported == ()
    settings = {"num_beams": 17, "encoder_no_repeat_ngram_size": 2, "eta_cutoff": 0.1}
    assert set(read(tmp_path, neutral | settings).unsupported) == {
        "num_beams=17",
        "encoder_no_repeat_ngram_size=2",
        "eta_cutoff=0.1",
    }


@pytest.mark.parametrize(
    "bias", [[[[1, 2], -1.0]], [[[1], -1000.0]], [[[1], -INF]], "x", [[1, 2]], [[["a"], "b"]]]
)
def test_a_bias_beyond_ours_is_named(tmp_path: Path, bias: Any) -> None:
    found = read(tmp_path, {"sequence_bias": bias})
    assert found.unsupported[0].startswith("sequence_bias=") and found.options.logit_bias is None


def test_every_setting_of_hugging_face_is_sorted() -> None:
    """A setting that a new version of transformers adds must be looked at."""
    harmless = {
        "num_beams",  # a field of its own
        # How the result is returned.
        *("output_attentions", "output_hidden_states"),
        *("output_scores", "output_logits", "return_dict_in_generate"),
        # How it is computed, which is the engine's affair.
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "use_mtp"),
        *("compile_config", "disable_compile", "low_memory", "prefill_chunk_size"),
        *("continuous_batching_config", "is_assistant", "num_assistant_tokens"),
        *("num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit"),
        *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
        *("speculation_type", "transformers_version"),
        # Without effect on a distribution, or on one that is finite.
        *("renormalize_logits", "remove_invalid_values"),
        *("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id"),
    }
    theirs = {name for name in GenerationConfig().__dict__ if not name.startswith("_")}
    ours = {*generation_config._UNSUPPORTED, *generation_config._OPTIONS}
    assert theirs - harmless - ours == set()
