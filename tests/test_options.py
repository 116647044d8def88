"""Options: what is refused and how, and how a model's files complete what a call leaves open."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lmi_multi import defaults, generation_config
from lmi_multi.defaults import GenerationDefaults
from lmi_multi.errors import CheckpointError, OptionError
from lmi_multi.ops.sampling import SampleRow
from lmi_multi.options import Completion, GenerateOptions, per_prompt
from lmi_multi.resolved import Resolved

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


# --- the model's files


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


def test_settings_of_the_file(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        {
            "do_sample": True,
            "num_return_sequences": 3,
            "min_p": 0.1,
            "typical_p": 0.9,
            "repetition_penalty": 1.2,
            "encoder_repetition_penalty": 1.1,
            "no_repeat_ngram_size": 3,
            "bad_words_ids": [[5], [6, 7], [2]],
            "suppress_tokens": [-1, 9],
            "forced_bos_token_id": 4,
            "forced_eos_token_id": [2, 8],
            "sequence_bias": [[[3], -1.5], [[4], 2.0]],
            "eos_token_id": 2,
        },
    )
    assert found.unsupported == ()
    got = resolve(found)
    assert (got.num_return_sequences, got.min_p, got.typical_p) == (3, 0.1, 0.9)
    assert (got.repetition_penalty, got.encoder_repetition_penalty) == (1.2, 1.1)
    assert (got.no_repeat_ngram_size, got.bad_words) == (3, ((5,), (6, 7)))
    assert (got.suppress_tokens, got.forced_bos_token_id) == ((9,), 4)
    assert (got.forced_eos_token_ids, got.logit_bias) == ((2, 8), ((3, -1.5), (4, 2.0)))
    got = resolve(found, repetition_penalty=1.0, bad_words=[], logit_bias={}, min_p=0)
    assert (got.repetition_penalty, got.bad_words, got.logit_bias, got.min_p) == (1.0, (), (), 0)
    # Made for beams, as in many files: no obstacle to greedy decoding.
    assert resolve(found, do_sample=False).num_return_sequences == 1


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


# --- resolve


def resolve(
    found: GenerationDefaults | None = None,
    prompt_tokens: int = 5,
    decoder_only: bool = True,
    limit: int = 0,
    **options: Any,
) -> Resolved:
    found = found or GenerationDefaults()
    return found.resolve(
        GenerateOptions(**options),
        prompt_tokens=prompt_tokens,
        decoder_only=decoder_only,
        limit=limit,
    )


def having(**options: Any) -> GenerationDefaults:
    return GenerationDefaults(eos_token_ids=(1, 2), options=GenerateOptions(**options))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    defaults._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "lmi_multi"):
        yield caplog


def test_hugging_faces_own_defaults() -> None:
    got = resolve()
    assert (got.max_new_tokens, got.min_new_tokens) == (20, 0)
    assert (got.do_sample, got.temperature, got.top_k, got.top_p) == (False, 1.0, 50, 1.0)
    assert (got.stop, got.ignore_eos) == ((), False)


def test_precedence() -> None:
    found = having(do_sample=True, temperature=0.5, top_k=7, max_new_tokens=9, stop=["a"])
    got = resolve(found, top_k=3)
    assert (got.do_sample, got.temperature, got.top_k, got.top_p) == (True, 0.5, 3, 1.0)
    assert (got.max_new_tokens, got.stop) == (9, ("a",))
    assert resolve(found, top_k=0, stop=[]).top_k == 0
    assert resolve(found, stop=[]).stop == ()
    assert resolve(found, do_sample=False).do_sample is False


def test_sampling_settings_beside_the_files_greedy(tmp_path: Path) -> None:
    """Real files hold such: they take effect once the call asks for sampling."""
    found = read(tmp_path, {"do_sample": False, "temperature": 0.6, "top_p": 0.9})
    assert resolve(found).do_sample is False
    got = resolve(found, do_sample=True)
    assert (got.temperature, got.top_p) == (0.6, 0.9)
    assert read(tmp_path, {"do_sample": False, "temperature": 0}).options == GenerateOptions()


def test_sampling_options_without_sampling_are_logged_once(
    warnings: pytest.LogCaptureFixture,
) -> None:
    for _ in range(3):
        assert resolve(temperature=0.7, top_k=50).do_sample is False
    assert [record.getMessage() for record in warnings.records] == [
        "temperature: no effect, as this model does not sample by default; "
        "set do_sample=True to sample"
    ]
    warnings.clear()
    assert resolve(having(do_sample=True), temperature=0.3).do_sample
    assert not warnings.records


def test_seeds() -> None:
    assert resolve(seed=0).seed == 0
    seeds = {resolve().seed for _ in range(20)}
    assert len(seeds) == 20 and all(0 <= seed < 2**64 for seed in seeds)


def test_ignore_eos_and_rows() -> None:
    got = resolve(having(), min_new_tokens=2, do_sample=True, seed=9, temperature=0.5, top_p=0.9)
    assert got.row(1) == SampleRow(0.5, 50, 0.9, 9, 1, banned=(1, 2))
    assert got.row(2) == SampleRow(0.5, 50, 0.9, 9, 2)
    assert resolve(having(), min_new_tokens=1).row(0) == SampleRow(step=0, banned=(1, 2))
    ignoring = resolve(having(), min_new_tokens=1, ignore_eos=True)
    assert ignoring.eos_token_ids == () and ignoring.row(0).banned == ()


# --- what only a resolved set of options can tell


def test_several_answers_need_sampling() -> None:
    assert resolve(do_sample=True, num_return_sequences=4).num_return_sequences == 4
    assert resolve(having(do_sample=True), num_return_sequences=4).num_return_sequences == 4
    with pytest.raises(OptionError, match=r"num_return_sequences is 2; allowed: at most 1, as gr"):
        resolve(num_return_sequences=2)


def test_beams() -> None:
    filed = having(length_penalty=0.5, early_stopping=True, num_return_sequences=3)
    filed = replace(filed, num_beams=4)
    got = resolve(filed)
    assert (got.num_beams, got.length_penalty, got.early_stopping) == (4, 0.5, True)
    assert got.num_return_sequences == 3
    got = resolve(filed, num_beams=2, length_penalty=2)
    assert (got.num_beams, got.length_penalty, got.num_return_sequences) == (2, 2.0, 2)
    assert resolve(filed, do_sample=True).num_beams == 1
    assert resolve(filed, num_beams=1).num_return_sequences == 1
    got = resolve(num_beams=6, num_beam_groups=3, diversity_penalty=0.5)
    assert (got.group_beams, got.num_beam_groups, got.diversity_penalty) == (2, 3, 0.5)
    with pytest.raises(OptionError, match="num_return_sequences is 5; allowed: at most 4, num_be"):
        resolve(num_beams=4, num_return_sequences=5)
    with pytest.raises(OptionError, match=r"num_beams is 2, and .* has do_sample=True; allowed"):
        resolve(having(do_sample=True), num_beams=2)
    with pytest.raises(OptionError, match="num_beam_groups is 4; allowed: what num_beams, 6, can"):
        resolve(num_beams=6, num_beam_groups=4, diversity_penalty=1)
    with pytest.raises(OptionError, match="diversity_penalty is 0, yet num_beam_groups is 2"):
        resolve(num_beams=6, num_beam_groups=2)
    with pytest.raises(OptionError, match=r"diversity_penalty is 0\.5, yet num_beam_groups is 1"):
        resolve(num_beams=6, diversity_penalty=0.5)


def test_beam_options_without_beams_are_logged(warnings: pytest.LogCaptureFixture) -> None:
    assert resolve(length_penalty=0.7, early_stopping=False).num_beams == 1
    assert [record.getMessage() for record in warnings.records] == [
        "length_penalty: no effect without beams; set num_beams"
    ]


def test_beams_of_the_file(tmp_path: Path) -> None:
    found = read(tmp_path, {"num_beams": 4, "length_penalty": 2.0, "top_k": 10, "typical_p": 0.9})
    assert (found.num_beams, found.options.length_penalty, found.unsupported) == (4, 2.0, ())
    assert resolve(found).num_beams == 4
    found = read(tmp_path, {"num_beams": 4, "do_sample": True})
    assert (found.num_beams, found.unsupported) == (1, ("num_beams=4",))
    found = read(tmp_path, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5})
    assert resolve(found).group_beams == 2
    with pytest.raises(OptionError, match=r"num_beam_groups in generation_config\.json is 2; all"):
        resolve(found, num_beams=3)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": True},
        {"num_beams": 0},
        {"num_beams": "4"},
        {"length_penalty": 20.0},
        {"early_stopping": "maybe"},
        {"early_stopping": 1},
        {"num_return_sequences": 32},
        {"num_beam_groups": 32},
        {"diversity_penalty": -1},
        {"num_beams": 4, "num_beam_groups": 2},
        {"num_beams": 4, "diversity_penalty": 0.5},
        {"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 0.5},
    ],
    ids=str,
)
def test_beam_settings_of_a_file_that_cannot_be_kept(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """They are named when the model is loaded, and do not keep it from loading or generating."""
    found = read(tmp_path, settings)
    kept = {"num_beams": 4} if settings.get("num_beams") == 4 else {}
    assert set(found.unsupported) == {f"{n}={v!r}" for n, v in settings.items() if n not in kept}
    assert resolve(found).num_beams == kept.get("num_beams", 1)


def test_forced_tokens_must_not_be_suppressed() -> None:
    with pytest.raises(OptionError, match="forced_bos_token_id is 3, which suppress_tokens has"):
        resolve(forced_bos_token_id=3, suppress_tokens=[1, 3])
    with pytest.raises(OptionError, match="forced_eos_token_id is 3, 4, which"):
        resolve(having(suppress_tokens=[4, 3]), forced_eos_token_id=[3, 4])
    resolve(forced_eos_token_id=[3, 4], suppress_tokens=[3])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bad_words", [[1], [9, 40]]),
        ("suppress_tokens", [40, 2]),
        ("forced_bos_token_id", 40),
        ("forced_eos_token_id", [1, 40]),
        ("logit_bias", {40: 1.0}),
        ("stop_token_ids", [40]),
    ],
)
def test_ids_must_be_in_the_vocabulary(name: str, value: Any) -> None:
    ask = {"prompt_tokens": 3, "decoder_only": True, "limit": 0}
    options = GenerateOptions(**{name: value})
    with pytest.raises(OptionError, match=f"{name} has the token id 40; allowed: 0 to 39, the"):
        GenerationDefaults().resolve(options, vocab=40, **ask)
    GenerationDefaults().resolve(options, vocab=41, **ask)
    GenerationDefaults().resolve(options, **ask)


def test_full_text_is_for_decoders() -> None:
    assert resolve(return_full_text=True).return_full_text
    with pytest.raises(OptionError, match="return_full_text is True; allowed: False, as an enc"):
        resolve(return_full_text=True, decoder_only=False)


class Letters:
    """A tokenizer of one token a character, with an end token of its own."""

    all_special_ids = (1,)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in text] + [1] * add_special_tokens

    def decode(self, token_ids: Any, **options: Any) -> str:
        return "".join(map(chr, token_ids))

    def convert_ids_to_tokens(self, ids: int) -> str:
        return chr(ids)


def test_bad_words_as_text() -> None:
    letters = Letters()

    def bad(words: Any, tokenizer: Any = letters) -> tuple[tuple[int, ...], ...]:
        return (
            GenerationDefaults(eos_token_ids=(98,))
            .resolve(
                GenerateOptions(bad_words=words),
                prompt_tokens=3,
                decoder_only=True,
                limit=0,
                tokenizer=tokenizer,
            )
            .bad_words
        )

    assert bad("ab") == ((97, 98), (32, 97, 98))
    assert bad([" a", [3, 4], "b"]) == ((32, 97), (3, 4), (32, 98))  # "b" alone ends a text
    assert bad([[3, 4]], None) == ((3, 4),)
    with pytest.raises(OptionError, match="bad_words has 'ab', and the model has no tokenizer"):
        bad("ab", None)
    with pytest.raises(OptionError, match=r"bad_words has .* is 70 tokens; allowed: 1 to 64"):
        bad("x" * 70)


def test_rows_carry_what_was_asked() -> None:
    got = resolve(
        having(), do_sample=True, seed=1, min_p=0.2, typical_p=0.5, logprobs=3, stop_token_ids=[7]
    )
    row = got.row(1, [5, 5, 6], stream=4)
    assert (row.min_p, row.typical_p, row.logprobs, row.stream) == (0.2, 0.5, 3, 4)
    assert resolve(having(), min_new_tokens=1, stop_token_ids=[7]).row(0).banned == (1, 2, 7)


def test_max_length() -> None:
    assert resolve(max_length=12).max_new_tokens == 7
    assert resolve(max_length=12, decoder_only=False).max_new_tokens == 11
    assert resolve(having(max_length=12)).max_new_tokens == 7
    assert resolve(max_length=12, max_new_tokens=3).max_new_tokens == 3
    assert resolve(having(max_length=12), max_new_tokens=30).max_new_tokens == 30
    assert resolve(having(max_new_tokens=30), max_length=12).max_new_tokens == 7
    with pytest.raises(OptionError, match=r"max_length is 5, and 5 tokens .* at least 6"):
        resolve(max_length=5)
    with pytest.raises(OptionError, match=r"max_length in generation_config.json is 4, and 5"):
        resolve(having(max_length=4))
    with pytest.raises(OptionError, match="at least 2"):
        resolve(max_length=1, decoder_only=False)


def test_both_lengths_are_logged(warnings: pytest.LogCaptureFixture) -> None:
    resolve(max_length=12, max_new_tokens=3)
    assert "max_new_tokens counts" in warnings.text


def test_min_length() -> None:
    assert resolve(min_length=12).min_new_tokens == 7
    assert resolve(min_length=3).min_new_tokens == 0
    assert resolve(min_length=12, decoder_only=False).min_new_tokens == 11
    assert resolve(min_length=12, min_new_tokens=2).min_new_tokens == 2
    assert resolve(having(min_new_tokens=8), min_length=12).min_new_tokens == 7
    assert resolve(having(min_length=40), max_new_tokens=4).min_new_tokens == 4
    with pytest.raises(OptionError, match=r"min_new_tokens is 21, .* at most the 20 new"):
        resolve(min_new_tokens=21)
    with pytest.raises(OptionError, match="min_length is 40, which is 35 new tokens"):
        resolve(min_length=40, max_new_tokens=10)


def test_limits() -> None:
    assert resolve(limit=8).max_new_tokens == 3
    assert resolve(limit=100).max_new_tokens == 20
    assert resolve(limit=8, decoder_only=False).max_new_tokens == 7
    assert resolve(having(max_new_tokens=2048), limit=50).max_new_tokens == 45
    assert resolve(limit=25, max_new_tokens=20).max_new_tokens == 20
    with pytest.raises(OptionError, match=r"max_new_tokens is 21, .* at most 20 new tokens"):
        resolve(limit=25, max_new_tokens=21)
    with pytest.raises(OptionError, match="max_length is 26, which is 21 new tokens"):
        resolve(limit=25, max_length=26)
    with pytest.raises(OptionError, match="the prompt has 8 tokens; allowed: at most 7"):
        resolve(limit=8, prompt_tokens=8)
    # The encoder's own limit is not the decoder's.
    assert resolve(limit=8, prompt_tokens=8, decoder_only=False).max_new_tokens == 7


# --- lengths against Hugging Face's generate


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
