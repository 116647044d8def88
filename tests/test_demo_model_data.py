"""The demo model's sentences, the shape of its checkpoint, and its answers to the examples."""

from __future__ import annotations

import json
import re
from random import Random

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from lmi_multi.demo import CHECKPOINT, EXAMPLES, items, spoken, tables
from lmi_multi.demo.spoken import HELD_OUT_SEED, content, is_held_out, pairs

ANSWERS = (
    "1999-03-03 18:30",
    "Meet me on 2021-07-04 at 12:00.",
    "2407",
    "Send 48 GB to room 205 before 17:30.",
    "The recipe needs 250 g of flour, 3 eggs and 0.5 L of milk.",
    "it was -12.5 °C in Oslo on 1 February",
    "He ran the marathon in 2 h 5 min and won €10000.",
    "2/3 of the 48 students passed, and 1/4 got more than 90%.",
)
PINNED = [
    ("They met in the nineteen twenties?", "They met in the 1920s?"),
    (
        "Carla and it met in twenty oh nine and married in sixteen ninety five",
        "Carla and it met in 2009 and married in 1695",
    ),
    ("Eighty eight square meters.", "88 m²."),
]
TRAINING_SEEDS = (0, 1, 7, 1_000_000_000, 1_000_000_001)


def drawn(maker: items.Maker, count: int = 40_000) -> dict[str, str]:
    rng = Random(0)
    return dict(maker(rng) for _ in range(count))


def test_same_seed_same_pairs() -> None:
    assert pairs(3, 200) == pairs(3, 200)
    assert pairs(3, 200)[:50] == pairs(3, 50)
    assert pairs(3, 200) != pairs(4, 200)


def test_pairs_are_pinned() -> None:
    """A change to the generator would silently change what published figures mean."""
    assert pairs(HELD_OUT_SEED, 3) == PINNED


def test_sentences_of_one_seed_differ() -> None:
    sentences = [content(said) for said, _ in pairs(5, 2_000)]
    assert len(set(sentences)) == 2_000


def test_held_out_sentences_are_disjoint_from_training() -> None:
    held_out = {content(said) for said, _ in pairs(HELD_OUT_SEED, 500)}
    assert all(is_held_out(said) for said in held_out)
    for seed in TRAINING_SEEDS:
        seen = [said for said, _ in pairs(seed, 1_000)]
        assert not any(is_held_out(said) for said in seen)
        assert held_out.isdisjoint(content(said) for said in seen)


def test_dressing_does_not_move_a_sentence_between_the_sides() -> None:
    for said, _ in pairs(11, 300):
        assert is_held_out(said) == is_held_out(said.upper() + ".")


def test_pairs_are_well_formed() -> None:
    numbers = {*tables.ONES, *tables.TENS[2:], "hundred", "thousand", "o'clock", "noon", "half"}
    for said, written in pairs(13, 3_000):
        assert said == said.strip() and written == written.strip()
        assert "  " not in said and "  " not in written
        assert not re.search(r"[\d{}$£€¥°%]", said)
        assert not re.search(r"[{}]", written)
        assert numbers.isdisjoint(re.findall(r"[a-z']+", written.lower()))
        assert 0 < len(said.encode()) <= spoken.MAX_SPOKEN
        assert 0 < len(written.encode()) <= spoken.MAX_WRITTEN


def test_each_spoken_number_has_one_written_form() -> None:
    rng = Random(17)
    forms: dict[str, str] = {}
    for _ in range(3_000):
        for maker in spoken.BARE:
            said, written = maker(rng)
            assert forms.setdefault(said, written) == written


def test_carrier_words_are_no_number_words() -> None:
    words = {*tables.WORDS, *tables.NAMES, *tables.THINGS, *tables.PLURALS, *tables.ORDERED}
    assert tables.RESERVED.isdisjoint(words | {*tables.SHORT_WORDS})
    rng = Random(19)
    assert tables.RESERVED.isdisjoint(spoken.word(rng) for _ in range(20_000))


@pytest.mark.parametrize(
    ("number", "british", "american"),
    [
        (0, "zero", "zero"),
        (42, "forty two", "forty two"),
        (905, "nine hundred and five", "nine hundred five"),
        (2_407, "two thousand four hundred and seven", "two thousand four hundred seven"),
        (1_000_006, "one million and six", "one million six"),
    ],
)
def test_cardinals(number: int, british: str, american: str) -> None:
    assert items.cardinal(number) == british
    assert items.cardinal(number, " ") == american


def test_whole_numbers_keep_round_millions_as_words() -> None:
    written = [items.write(n) for n in (0, 2_407, 1_500_000, 2_000_000, 7_000_000_000)]
    assert written == ["0", "2407", "1500000", "2 million", "7 billion"]


@pytest.mark.parametrize(
    ("number", "pair"),
    [
        (1, ("first", "1st")),
        (12, ("twelfth", "12th")),
        (22, ("twenty second", "22nd")),
        (111, ("one hundred and eleventh", "111th")),
        (90, ("ninetieth", "90th")),
    ],
)
def test_ordinals(number: int, pair: tuple[str, str]) -> None:
    assert items.ordinal(number) == pair


def test_years_and_days() -> None:
    rng = Random(23)
    assert items.year_words(1999, rng) == "nineteen ninety nine"
    assert items.year_words(1905, rng) == "nineteen oh five"
    assert items.year_words(1900, rng) == "nineteen hundred"
    assert items.year_words(2000, rng) == "two thousand"
    assert {items.year_words(2024, rng) for _ in range(99)} == {
        "twenty twenty four",
        "two thousand and twenty four",
        "two thousand twenty four",
    }
    days = {items.day_words(3, 3, rng) for _ in range(99)}
    assert days == {"the third of march", "third of march", "march third", "march the third"}


def test_known_times() -> None:
    times = drawn(items.at)
    for said, written in {
        "half past six in the evening": "18:30",
        "quarter to nine in the morning": "08:45",
        "ten to one in the afternoon": "12:50",
        "half past twelve at night": "00:30",
        "twelve am": "00:00",
        "six oh five pm": "18:05",
        "noon": "12:00",
        "midnight": "00:00",
        "half past six": "06:30",
        "nineteen oh five": "19:05",
        "eighteen hundred hours": "18:00",
        "nine": "09:00",
    }.items():
        assert times[f"at {said}"] == f"at {written}"


def test_known_days_and_decades() -> None:
    days = drawn(items.day)
    assert days["the first of february"] == "1 February"
    assert days["friday"] == "Friday"
    assert drawn(items.decade)["nineteen eighties"] == "1980s"


def test_checkpoint_is_small_and_bf16() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 8_000_000
    with (CHECKPOINT / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__")
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["architectures"] == ["T5ForConditionalGeneration"]
    for size in ("num_heads", "d_ff", "vocab_size"):
        assert config[size] % 4 == 0


def test_examples_are_answered_right() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = AutoModelForSeq2SeqLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    inputs = tokenizer(list(EXAMPLES), padding=True, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False)
    assert tuple(tokenizer.batch_decode(tokens, skip_special_tokens=True)) == ANSWERS
