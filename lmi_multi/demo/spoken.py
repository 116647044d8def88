"""Seeded generator of (spoken, written) sentence pairs for the demo model.

A spoken sentence says every number in words; the written one says the same with
digits, symbols and ISO 8601 dates. The grammar gives each spoken sentence exactly one
written form; `checkpoint/README.md` describes it in full.

>>> pairs(1, 1) == pairs(1, 1)
True
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from random import Random

from lmi_multi.demo import tables
from lmi_multi.demo.items import ITEMS, Maker, Pair, stamp

HELD_OUT_SEED = 20_261_122
"""The only seed whose sentences come from the held-out bucket (see `is_held_out`)."""

HELD_OUT_COUNT = 2_000
"""How many held-out sentences the published figures are measured on."""

MAX_SPOKEN, MAX_WRITTEN = 95, 63
"""Most UTF-8 bytes of each side of a pair: 96 and 64 tokens with the end marker."""


def word(rng: Random) -> str:
    """A carrier word: a common one or, so that any word can be copied, a made-up one."""
    if rng.random() < 0.75:
        return rng.choice(rng.choice((tables.WORDS, tables.WORDS, tables.SHORT_WORDS)))
    syllables = (
        rng.choice("bcdfghjklmnprstvwyz") + rng.choice("aeiou") + rng.choice(("", "", *"lmnrstk"))
        for _ in range(rng.randint(2, 3))
    )
    made = "".join(syllables)
    return "word" if made in tables.RESERVED else made


def name(rng: Random) -> str:
    text = rng.choice(tables.NAMES) if rng.random() < 0.7 else word(rng)
    return text.capitalize() if rng.random() < 0.4 else text


FILLERS: dict[str, Callable[[Random], str]] = {
    "name": name,
    "thing": lambda rng: rng.choice(tables.THINGS),
    "plural": lambda rng: rng.choice(tables.PLURALS),
    "place": lambda rng: rng.choice(tables.PLACES),
    "ordered": lambda rng: rng.choice(tables.ORDERED),
}
"""Carrier words, copied as they are, by the name of the slot that they fill."""

BARE: tuple[Maker, ...] = (*ITEMS.values(), stamp, stamp, stamp)
SENTENCES = [re.split(r"[{}]", text) for text in re.split(r"[|\n]", tables.TEMPLATES.strip())]
"""Each template as text and slot names in turn."""


def fill(slot: str, rng: Random) -> Pair:
    if slot in ITEMS:
        return ITEMS[slot](rng)
    text = FILLERS[slot](rng)
    return text, text


def framed(rng: Random) -> Pair:
    """One of the templates with its slots filled."""
    parts = rng.choice(SENTENCES)
    filled = [fill(text, rng) if i % 2 else (text, text) for i, text in enumerate(parts)]
    return "".join(spoken for spoken, _ in filled), "".join(written for _, written in filled)


def run(rng: Random, least: int) -> str:
    """Up to three carrier words and sometimes one that connects them to a number."""
    words = [word(rng) for _ in range(rng.randint(least, 3))]
    if not words:
        return ""
    change = rng.choice((str.capitalize, str.upper) + 8 * (str.lower,))
    words[0] = rng.choice(("the ", "a ", *[""] * 8)) + change(words[0])
    return " ".join(words + rng.choice(([rng.choice(tables.CONNECTORS)], [], [])))


def free(rng: Random) -> Pair:
    """Words and one to four numbers in any order, so that no context is taken for granted.

    Two numbers never meet without a word or a comma between them: "fifty" and "two"
    side by side would be one number.
    """
    spoken = written = run(rng, 0)
    for i in range(rng.choice((1, 1, 2, 2, 3, 4))):
        comma = rng.random() < 0.3
        if i:
            between = run(rng, not comma) or rng.choice(("", "", "and", "then", "but", "not"))
            between = "," * comma + f" {between}".rstrip()
            spoken, written = spoken + between, written + between
        item = rng.choice(tuple(ITEMS.values()))(rng)
        spoken, written = f"{spoken} {item[0]}", f"{written} {item[1]}"
    end = " ".join(word(rng) for _ in range(rng.randint(0, 3)))
    return f"{spoken} {end}".strip(), f"{written} {end}".strip()


def dress(pair: Pair, rng: Random) -> Pair:
    """Add the capitals and the final mark of a written sentence to both sides."""
    spoken, written = pair
    names = "|".join(tables.MONTHS + tables.WEEKDAYS)
    spoken = re.sub(rf"\b({names})\b", lambda found: found[0].capitalize(), spoken)
    if written[0] == spoken[0]:  # the sentence begins with a word that is copied
        written = written[0].upper() + written[1:]
    mark = rng.choice((".", ".", "?", "!", ""))
    return spoken[0].upper() + spoken[1:] + mark, written + mark


def bare(rng: Random) -> Pair:
    """A number alone."""
    return rng.choice(BARE)(rng)


def sentence(rng: Random) -> Pair:
    pair = rng.choices((bare, framed, free), (0.2, 0.5, 0.3))[0](rng)
    return dress(pair, rng) if rng.random() < 0.25 else pair


def content(spoken: str) -> str:
    """The words of a sentence without capitals and punctuation."""
    return re.sub(r"[.,?!]", "", spoken.lower())


def is_held_out(spoken: str) -> bool:
    """Whether a sentence is in the twentieth of all sentences that training never sees.

    The bucket follows from the words alone, so it holds for every seed, and adding a
    capital or a full stop does not move a sentence to the other side.
    """
    return zlib.crc32(content(spoken).encode()) % 20 == 0


def pairs(seed: int, count: int) -> list[Pair]:
    """Make `count` different (spoken, written) pairs, the same ones for the same seed.

    `HELD_OUT_SEED` gives held-out sentences only; every other seed gives none of them.
    """
    rng = Random(seed)
    found: dict[str, Pair] = {}
    while len(found) < count:
        spoken, written = sentence(rng)
        short = len(spoken.encode()) <= MAX_SPOKEN and len(written.encode()) <= MAX_WRITTEN
        if short and is_held_out(spoken) == (seed == HELD_OUT_SEED):
            found.setdefault(content(spoken), (spoken, written))
    return list(found.values())
