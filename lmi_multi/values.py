"""The kinds of values that options take: numbers, token ids, words, biases.

Each check returns the value in one immutable form, which it also accepts, and raises ValueError
for anything else; whoever asks says what is allowed.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Annotated

from pydantic import BeforeValidator, StrictFloat, StrictInt

MAX_STOPS = 16
"""The most stop strings that one prompt may have."""
MAX_STOP_CHARACTERS = 1024
"""The most characters in one stop string: each prompt of a request has a copy of all of them, and
every token is held against them."""
MAX_IDS = 4096
"""The most token ids in one option: each of them costs time at every step."""
MAX_WORDS = 1024
"""The most bad words that one prompt may have."""
MAX_WORD_TOKENS = 64
"""The most tokens in one bad word."""
MAX_WORD_CHARACTERS = 256
"""The most characters in one bad word that is given as text."""
MAX_BIAS = 100.0
"""The largest logit bias, up or down: OpenAI's."""

Word = str | tuple[int, ...]
Bias = tuple[tuple[int, float], ...]


def plain_int(value: object) -> object:
    """numpy's integers as `int`; a bool stays what it is, and is refused later."""
    integral = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return int(value) if integral else value  # type: ignore[call-overload]


def plain_float(value: object) -> object:
    """Any real number but a bool as `float`; one beyond float's range stays, and is refused."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return value
    try:
        return float(value)
    except OverflowError:
        return value


Int = Annotated[StrictInt, BeforeValidator(plain_int)]
Float = Annotated[StrictFloat, BeforeValidator(plain_float)]


def strings(value: object) -> tuple[str, ...]:
    """One string of 1 to `MAX_STOP_CHARACTERS` characters, or a list of up to `MAX_STOPS`."""
    entries = _listed((value,) if isinstance(value, str) else value, MAX_STOPS)
    if not all(isinstance(e, str) and 0 < len(e) <= MAX_STOP_CHARACTERS for e in entries):
        raise ValueError("not all of them are strings, or one is empty or too long")
    return tuple(map(str, entries))


def token_id(value: object) -> int:
    """An id that a vocabulary could have."""
    number = plain_int(value)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**31:
        raise ValueError("not a token id")
    return number


def token_ids(value: object) -> tuple[int, ...]:
    """A list of up to `MAX_IDS` token ids, each once."""
    return tuple(dict.fromkeys(token_id(entry) for entry in _listed(value, MAX_IDS)))


def one_or_more_ids(value: object) -> tuple[int, ...]:
    """One token id, or a list of them."""
    return token_ids(value if isinstance(value, list | tuple) else (value,))


def words(value: object) -> tuple[Word, ...]:
    """One string, or a list of up to `MAX_WORDS` strings and lists of token ids, each once."""
    entries = _listed((value,) if isinstance(value, str) else value, MAX_WORDS)
    return tuple(dict.fromkeys(map(_word, entries)))


def bias(value: object) -> Bias:
    """A mapping of up to `MAX_IDS` token ids to finite numbers, or the pairs of one.

    An id may be a string of digits: the keys of a JSON object cannot be anything else.
    """
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    found: dict[int, float] = {}
    for pair in _listed(pairs, MAX_IDS):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError("not a mapping")
        key, amount = pair[0], plain_float(pair[1])
        if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10:
            key = int(key)
        if not isinstance(amount, float) or not math.fabs(amount) <= MAX_BIAS:  # a NaN is not
            raise ValueError("not a number within the range")
        found[token_id(key)] = amount
    return tuple(found.items())


def optional(check: Callable[[object], object]) -> BeforeValidator:
    """`check` as pydantic's validator, for an option that may be None."""
    return BeforeValidator(lambda value: None if value is None else check(value))


def _word(value: object) -> Word:
    if isinstance(value, str):
        if not 0 < len(value) <= MAX_WORD_CHARACTERS:
            raise ValueError("empty or too long")
        return value
    ids = tuple(token_id(entry) for entry in _listed(value, MAX_WORD_TOKENS))
    if not ids:
        raise ValueError("a word of no tokens")
    return ids


def _listed(value: object, most: int) -> list[object] | tuple[object, ...]:
    if not isinstance(value, list | tuple) or len(value) > most:
        raise ValueError("not a list, or too long a one")
    return value
