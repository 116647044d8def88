"""Streamed text against the tokenizer's own decoding of all tokens at once."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from lmi_multi.engine.detokenizer import Detokenizer

TEXTS = [
    "The third of March, at half past six: it rained. 'Really?' she asked; \"Yes!\"",
    "Größe, façade, naïve, Ελλάδα, Привет мир, 日本語のテキスト, 한국어, עברית, العربية",
    "emoji 😀 👩‍👩‍👧 🇩🇪 and  two   spaces\tand tabs\n\nand lines.  1,234.50 € a ▁ b",
    "def f(x):\n    return x ** 2  # indented\n",
    "",
    " leading and trailing ",
]
SPECIAL = ["<pad>", "</s>", "<unk>"]
NAMES = ["byt5", "byte-bpe", "unigram", "byte-fallback", "wordpiece"]


def fast(backend: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def byte_bpe() -> Any:
    """As GPT-2's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet),
    )
    backend.add_tokens([AddedToken("<tool>", special=False)])
    return fast(backend)


def unigram() -> Any:
    """As T5's: sentencepiece, spaces at the start of words."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>")
    )
    return fast(backend)


def byte_fallback() -> Any:
    """As Llama 2's: what is not in the vocabulary becomes tokens of one byte."""
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({c for text in (TEXTS[0], TEXTS[3], "日é▁") for c in text if not c.isspace()})
    vocab = {name: i for i, name in enumerate([*names, *letters, "▁t", "▁a", "he", "▁▁"])}
    merges = [("▁", "t"), ("▁", "a"), ("h", "e"), ("▁", "▁")]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(SPECIAL)
    return fast(backend)


def wordpiece() -> Any:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=250, special_tokens=SPECIAL)
    )
    return fast(backend)


@cache
def tokenizer(name: str) -> Any:
    made = {
        "byt5": ByT5Tokenizer,
        "byte-bpe": byte_bpe,
        "unigram": unigram,
        "byte-fallback": byte_fallback,
        "wordpiece": wordpiece,
    }
    return made[name]()


def decode(name: str, ids: list[int], skip: bool = True) -> str:
    text = tokenizer(name).decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def stream(name: str, ids: list[int], stop: tuple[str, ...] = (), skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer(name), stop, skip)
    pieces = [detokenizer.push(token) for token in ids]
    pieces.append(detokenizer.flush())
    assert detokenizer.text == "".join(pieces)
    assert detokenizer.flush() == ""
    for piece in pieces:
        piece.encode()  # whole characters: no lone surrogates
    return pieces


def push_all(detokenizer: Detokenizer, ids: list[int]) -> int:
    """Push until a stop string comes; returns how many tokens were used."""
    used = 0
    while used < len(ids) and not detokenizer.stopped:
        detokenizer.push(ids[used])
        used += 1
    detokenizer.flush()
    return used


def cut(text: str, stops: tuple[str, ...]) -> str:
    """`text` before the stop string that ends first, and of those the one that starts first."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


names = st.sampled_from(NAMES)


@st.composite
def tokens(draw: st.DrawFn) -> tuple[str, list[int]]:
    """A tokenizer, and random ids among pieces of real text."""
    name = draw(names)
    top = len(tokenizer(name)) - 1
    ids: list[int] = []
    for _ in range(draw(st.integers(0, 6))):
        if draw(st.booleans()):
            ids += draw(st.lists(st.integers(0, top), max_size=12))
        else:
            text = draw(st.sampled_from(TEXTS) | st.text(max_size=8))
            ids += tokenizer(name).encode(text, add_special_tokens=draw(st.booleans()))
    return name, ids


@settings(max_examples=400, deadline=None)
@given(tokens(), st.booleans())
@example(("byt5", [3 + 0xE2, 1, 3 + 0x82, 3 + 0xAC]), True)  # a character around an end token
@example(("byte-fallback", [3 + 0xE2, 3 + 0x82, 3 + 0xAC, 3 + 0xE2]), True)  # spoilt by its end
def test_pieces_are_the_whole_text(case: tuple[str, list[int]], skip: bool) -> None:
    name, ids = case
    assert "".join(stream(name, ids, skip=skip)) == decode(name, ids, skip)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS)
def test_real_text(name: str, text: str) -> None:
    ids = tokenizer(name).encode(text)
    assert "".join(stream(name, ids)) == decode(name, ids)


@pytest.mark.parametrize("name", ["byt5", "byte-bpe", "byte-fallback"])
def test_characters_come_whole_and_at_once(name: str) -> None:
    ids = tokenizer(name).encode("a日😀b", add_special_tokens=False)
    pieces = stream(name, ids)
    assert "".join(pieces) == "a日😀b"
    assert "\ufffd" not in "".join(pieces)
    if name != "byte-fallback":  # whose runs of bytes end with the next token
        assert pieces[-1] == ""


def test_text_flows() -> None:
    """No token of plain text is held back."""
    ids = tokenizer("byte-bpe").encode(TEXTS[0])
    assert all(stream("byte-bpe", ids)[:-1])
    ids = tokenizer("byt5").encode("plain", add_special_tokens=False)
    assert stream("byt5", ids) == [*"plain", ""]


def test_spaces_after_special_tokens() -> None:
    """A skipped token must not make the next word the first of a text."""
    made = tokenizer("unigram")
    one, two = made.encode("The"), made.encode("rained")
    ids = [*one, made.eos_token_id, made.pad_token_id, *two]
    assert "".join(stream("unigram", ids)) == decode("unigram", ids) == "The rained"


def test_incomplete_bytes_at_the_end() -> None:
    assert stream("byt5", [100, 3 + 0xE2])[-1] == ""  # ByT5 drops them
    ids = tokenizer("byte-bpe").encode("é")[:1]
    assert decode("byte-bpe", ids) in ("é", "\ufffd")
    assert "".join(stream("byte-bpe", ids)) == decode("byte-bpe", ids)


# --- stop strings


@pytest.mark.parametrize("name", ["byt5", "byte-bpe", "unigram", "byte-fallback"])
@pytest.mark.parametrize("text", [TEXTS[0], "a日é😀 b\nc"])
def test_stop_strings_at_every_place(name: str, text: str) -> None:
    ids = tokenizer(name).encode(text, add_special_tokens=False)
    whole = decode(name, ids)
    for start in range(len(whole)):
        for length in (1, 2, 5):
            stop = whole[start : start + length]
            detokenizer = Detokenizer(tokenizer(name), (stop,))
            used = push_all(detokenizer, ids)
            assert detokenizer.stopped
            assert detokenizer.text == whole[: whole.index(stop)]
            # It stopped as soon as the tokens held the stop string.
            assert stop not in decode(name, ids[: used - 1])


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple),
)
@example("xabcd", ("abcd", "bc"))
@example("aab", ("ab", "aab"))
def test_which_stop_string_counts(text: str, stops: tuple[str, ...]) -> None:
    ids = tokenizer("byt5").encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer("byt5"), stops)
    for token in ids:
        detokenizer.push(token)
    detokenizer.flush()
    assert detokenizer.text == cut(text, stops)
    assert detokenizer.stopped == any(stop in text for stop in stops)


@settings(max_examples=300, deadline=None)
@given(tokens(), st.data())
def test_stop_strings_in_any_tokens(case: tuple[str, list[int]], data: st.DataObject) -> None:
    name, ids = case
    whole = decode(name, ids)
    spans = st.tuples(st.integers(0, max(len(whole) - 1, 0)), st.integers(1, 6))
    stops = tuple(
        whole[a : a + n] or "zz" for a, n in data.draw(st.lists(spans, min_size=1, max_size=3))
    )
    detokenizer = Detokenizer(tokenizer(name), stops)
    used = push_all(detokenizer, ids)
    assert detokenizer.text == cut(decode(name, ids[:used]), stops)


def test_an_end_that_might_begin_a_stop_string_is_held() -> None:
    ids = tokenizer("byt5").encode("xxaby", add_special_tokens=False)
    assert stream("byt5", ids, ("abc",)) == ["x", "x", "", "", "aby", ""]
    assert stream("byt5", ids[:-1], ("abc",)) == ["x", "x", "", "", "ab"]
    assert stream("byt5", ids, ("ab", "q")) == ["x", "x", "", "", "", ""]


def test_a_stop_string_of_one_byte_token_stops_at_once() -> None:
    """Llama 2 writes a newline as a byte token, whose run might go on."""
    ids = tokenizer("byte-fallback").encode("a\n", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer("byte-fallback"), ("\n",))
    for token in ids:
        detokenizer.push(token)
    assert detokenizer.stopped and detokenizer.text == "a"


def test_nothing_comes_after_a_stop() -> None:
    detokenizer = Detokenizer(tokenizer("byt5"), ("b",))
    assert [detokenizer.push(3 + ord(c)) for c in "abc"] == ["a", "", ""]
    assert detokenizer.flush() == "" and detokenizer.text == "a"


# --- cost


@pytest.mark.parametrize("name", NAMES)
def test_long_texts_cost_what_they_are_long(name: str) -> None:
    """Every decode sees a window, not the whole text."""
    ids = tokenizer(name).encode(TEXTS[0] * 40, add_special_tokens=False)
    made, seen = tokenizer(name), 0

    class Counting:
        is_fast = made.is_fast
        all_special_ids = made.all_special_ids
        convert_ids_to_tokens = staticmethod(made.convert_ids_to_tokens)

        def decode(self, ids: list[int], **keywords: Any) -> Any:
            nonlocal seen
            seen += len(ids)
            return made.decode(ids, **keywords)

    detokenizer: Any = Detokenizer(Counting(), ("nowhere",))  # type: ignore[arg-type]
    for token in ids:
        detokenizer.push(token)
    detokenizer.flush()
    assert len(ids) > 500 and seen < 8 * len(ids)


@pytest.mark.parametrize("byte", [0xE2, 0x82])
@pytest.mark.parametrize("name", ["byt5", "byte-bpe", "byte-fallback"])
def test_gibberish_does_not_stall(name: str, byte: int) -> None:
    made = tokenizer(name)
    if name == "byte-bpe":
        spelled = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("日")[0][0]
        token = made.convert_tokens_to_ids(spelled[byte != 0xE2])
    else:
        token = 3 + byte
    start = time.process_time()  # others may be using the machine
    assert "".join(stream(name, [token] * 2000)) == decode(name, [token] * 2000)
    assert time.process_time() - start < 5
