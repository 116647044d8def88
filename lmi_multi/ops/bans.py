"""Which tokens a sequence's past forbids next. Host code: a few comparisons, no tensors.

Meaning as Hugging Face's NoRepeatNGramLogitsProcessor and NoBadWordsLogitsProcessor.
"""

from __future__ import annotations

from collections.abc import Sequence


def ngram_bans(tokens: Sequence[int], size: int) -> list[int]:
    """Ids that would complete an n-gram of `size` >= 1 tokens which `tokens` already hold.

    Each id as often as its n-gram comes; `tokens` shorter than an n-gram forbid nothing.
    """
    past = list(tokens)
    if len(past) < size:
        return []
    if size == 1:
        return past
    prefix = past[len(past) - size + 1 :]
    found: list[int] = []
    end = size - 2  # where a copy of the prefix may end
    while True:
        try:  # the search for the prefix's last token is one fast call, however long the past
            end = past.index(prefix[-1], end, len(past) - 1)
        except ValueError:
            return found
        if past[end - size + 2 : end + 1] == prefix:
            found.append(past[end + 1])
        end += 1


def word_bans(tokens: Sequence[int], words: Sequence[Sequence[int]]) -> list[int]:
    """The last ids of those `words`, lists of at least one id, that `tokens` end with the rest of.

    A word of a single token is always forbidden.
    """
    return [word[-1] for word in words if _ends_with(tokens, word[:-1])]


def _ends_with(tokens: Sequence[int], end: Sequence[int]) -> bool:
    if not end:
        return True
    # Most words fail at the first comparison.
    return (
        len(tokens) >= len(end) and tokens[-1] == end[-1] and list(tokens[-len(end) :]) == list(end)
    )
