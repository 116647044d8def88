"""How a call's options are completed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmi_multi import defaults
from lmi_multi.defaults import GenerationDefaults
from lmi_multi.errors import OptionError
from lmi_multi.ops.sampling import SampleRow
from lmi_multi.options import GenerateOptions
from lmi_multi.resolved import Resolved
from tests.test_generation_config import read


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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 9, "min_length": 7},
        {"max_new_tokens": 3, "temperature": 0.5, "do_sample": True, "seed": 1, "bad_words": [[3]]},
    ],
    ids=str,
)
@pytest.mark.parametrize("decoder_only", [True, False])
def test_for_another_prompt_only_lengths_and_seeds_are_found_anew(
    options: dict[str, Any], decoder_only: bool
) -> None:
    found = having(temperature=0.7)
    given = GenerateOptions(**options)
    ask: dict[str, Any] = {"decoder_only": decoder_only, "limit": 16}
    first = found.resolve(given, prompt_tokens=2, **ask)
    assert found.resolve(given, prompt_tokens=2, like=first, **ask) is first
    again = found.resolve(given, prompt_tokens=8, like=first, **ask)
    whole = found.resolve(given, prompt_tokens=8, **ask)
    assert again == (whole if first.do_sample else replace(whole, seed=first.seed))
    if decoder_only:
        with pytest.raises(OptionError, match=r"^the prompt has 16 tokens; allowed: at most 15"):
            found.resolve(given, prompt_tokens=16, like=first, **ask)


def test_every_prompt_that_samples_has_a_seed_of_its_own() -> None:
    given = GenerateOptions(do_sample=True)
    ask: dict[str, Any] = {"prompt_tokens": 2, "decoder_only": True, "limit": 16}
    first = having().resolve(given, **ask)
    seeds = {first.seed} | {having().resolve(given, like=first, **ask).seed for _ in range(8)}
    assert len(seeds) == 9


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
    row = got.row(1, stream=4)
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
