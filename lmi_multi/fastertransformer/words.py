"""Bad words and stop words in the forms in which FasterTransformer's users have them."""

from __future__ import annotations

from typing import Any

from lmi_multi.errors import OptionError
from lmi_multi.tokenizer import Tokenizer

Word = str | tuple[int, ...]


def word_lists(
    name: str, value: Any, count: int, tokenizer: Tokenizer | None
) -> list[dict[str, Any]]:
    """What `bad_words_list` or `stop_words_list` is in options, for each of `count` prompts.

    `value` is None; a list of words for all prompts, or one such list for each; or the original's
    array of integers [2, n] or [prompts, 2, n], which holds token ids and where words end. A word
    is a string, or a list of token ids.
    """
    lists = _per_prompt(name, value, count)
    as_options = _bad if name == "bad_words_list" else _stop
    return [as_options(words, tokenizer) if words else {} for words in lists]


def _bad(words: list[Word], tokenizer: Tokenizer | None) -> dict[str, Any]:
    return {"bad_words": words}


def _stop(words: list[Word], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Single tokens stop by their id, longer words by their text."""
    ids = [word[0] for word in words if not isinstance(word, str) and len(word) == 1]
    texts = [word for word in words if isinstance(word, str)]
    for word in words:
        if isinstance(word, str) or len(word) == 1:
            continue
        if tokenizer is None:
            raise OptionError("stop_words_list has a word of several tokens, but no tokenizer")
        texts.append(tokenizer.decode(word, clean_up_tokenization_spaces=False))
    return ({"stop_token_ids": ids} if ids else {}) | ({"stop": texts} if texts else {})


def _per_prompt(name: str, value: Any, count: int) -> list[list[Word]]:
    if value is None:
        return [[]] * count
    if hasattr(value, "tolist"):
        lists = _arrays(name, value)
    elif not isinstance(value, list | tuple):
        raise OptionError(f"{name} is {value!r:.80}; allowed: a list of words, or an array")
    elif _is_nested(value):
        lists = [_words(name, own) for own in value]
    else:
        lists = [_words(name, value)]
    if len(lists) == 1:
        return lists * count
    if len(lists) != count:
        raise OptionError(
            f"{name} has {len(lists)} lists for {count} prompts; allowed: one for all, or one for "
            "each prompt"
        )
    return lists


def _is_nested(value: list[Any] | tuple[Any, ...]) -> bool:
    """Whether it holds lists of words: of strings, or of lists."""
    first = next((own[0] for own in value if isinstance(own, list | tuple) and own), None)
    return isinstance(first, str | list | tuple)


def _words(name: str, value: Any) -> list[Word]:
    if not isinstance(value, list | tuple):
        raise OptionError(f"{name} holds {value!r:.80}; allowed: lists of words")
    words: list[Word] = []
    for word in value:
        if isinstance(word, str) and word:
            words.append(word)
        elif isinstance(word, list | tuple) and word and all(type(i) is int for i in word):
            words.append(tuple(word))
        else:
            raise OptionError(
                f"{name} holds the word {word!r:.80}; allowed: strings, and lists of token ids"
            )
    return words


def _arrays(name: str, value: Any) -> list[list[Word]]:
    rows = value.tolist()
    shape = tuple(value.shape)
    if len(shape) == 2:
        shape, rows = (1, *shape), [rows]
    if len(shape) != 3 or shape[1] != 2:
        raise OptionError(
            f"{name} is an array of shape {list(value.shape)}; allowed: [2, n], [prompts, 2, n]"
        )
    return [_from_offsets(name, ids, ends) for ids, ends in rows]


def _from_offsets(name: str, ids: list[Any], ends: list[Any]) -> list[Word]:
    """Words out of the ids of all of them and the place after each; the rest is -1."""
    words: list[Word] = []
    start = 0
    for end in ends:
        if end == -1:
            continue
        if type(end) is not int or not start < end <= len(ids):
            raise OptionError(
                f"{name} has a word end {end!r} after {start}, with {len(ids)} token ids"
            )
        words.append(tuple(ids[start:end]))
        start = end
    return words
