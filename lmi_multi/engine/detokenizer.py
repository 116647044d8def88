"""From tokens, one by one, to text that is safe to show."""

from __future__ import annotations

import copy
import re

from lmi_multi.tokenizer import Tokenizer, text_of

# What a decoder puts where bytes make no character, or not yet.
_REPLACEMENT = "\ufffd"
# A token of a sentencepiece vocabulary that stands for one byte.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

# Beyond so many tokens without settled text, not every token is tried.
_PATIENCE = 32


class Detokenizer:
    """Text of a growing list of tokens, in pieces that never have to be taken back.

    All pieces together are `tokenizer.decode(ids, skip_special_tokens=...,
    clean_up_tokenization_spaces=False)`, cut before the first stop string. Whichever stop string
    ends first counts; of those that end together, the one that starts first.

    Held back are: bytes that are not yet a character, and an end of the text with which a stop
    string may begin. What a token looks like depends on its neighbours, so tokens are decoded in
    a window that starts before the last piece, not alone; a decoder's view is taken to reach no
    further than that.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), skip_special_tokens: bool = True
    ) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids) if skip_special_tokens else frozenset()
        # Tokenizers in Python collect the special tokens anew at every decode, which takes ten
        # times as long as the rest: their special tokens are left out here. Those in Rust are
        # fast, and have their own list.
        self._drops = skip_special_tokens and not getattr(tokenizer, "is_fast", False)
        self._decoder_skips = skip_special_tokens and not self._drops
        self._window: list[int] = []
        self._fresh = 0  # where in the window the tokens of the current piece begin
        self._done = 0  # how many characters of the window's text are released
        self._stops = _Stops(stop)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """Everything that was emitted."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Add a token; returns the new text that is safe to emit, often none.

        After `stopped` tokens are ignored.
        """
        if self.stopped or (self._drops and token_id in self._special):
            return ""
        self._window.append(token_id)
        if self._patient():
            return ""
        if self._open(token_id):
            return self._stop_early()
        text = self._decode(self._window)
        partial = text.endswith(_REPLACEMENT)
        return self._emit(self._release(text[:-1] if partial else text, settled=not partial))

    def pushed(self, token_id: int) -> Detokenizer:
        """A copy with one more token; this one stays as it is."""
        other = copy.copy(self)
        other._window, other._pieces = [*self._window], [*self._pieces]
        other._stops = copy.copy(self._stops)
        other.push(token_id)
        return other

    def flush(self) -> str:
        """The rest of the text: no more tokens come."""
        if self.stopped:
            return ""
        piece = self._emit(self._release(self._decode(self._window), settled=True))
        if self.stopped:
            return piece
        rest = self._stops.flush()
        self._pieces.append(rest)
        return piece + rest

    def _patient(self) -> bool:
        """Whether to wait for more tokens, as those before made no text.

        Gibberish may never become a whole character. The longer it goes on, the rarer it is
        looked at: else its cost would grow with the square of its length.
        """
        pending = len(self._window) - self._fresh
        return pending >= _PATIENCE and pending % (pending // _PATIENCE + 1) != 0

    def _open(self, token_id: int) -> bool:
        """Whether a later token may still change how this one reads.

        A run of byte tokens is decoded as one: a bad byte at its end spoils all of it. Special
        tokens that are skipped do not end a run.
        """
        if token_id in self._special:
            return True
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        return isinstance(name, str) and _BYTE_TOKEN.fullmatch(name) is not None

    def _stop_early(self) -> str:
        """Emit unsettled text if it completes a stop string: nothing will come to change it."""
        if self._stops.empty:
            return ""
        text = self._decode(self._window)
        if not self._stops.hit(text[self._done :]):
            return ""
        return self._emit(self._release(text, settled=False))

    def _decode(self, ids: list[int]) -> str:
        return text_of(self._tokenizer, ids, self._decoder_skips)

    def _release(self, text: str, settled: bool) -> str:
        """What `text`, the window's, adds to what was released; moves the window up.

        `settled`: the text ends on a whole character, so the next piece may start there.
        """
        if len(text) <= self._done:
            return ""
        piece, self._done = text[self._done :], len(text)
        if settled:
            self._advance()
        return piece

    def _advance(self) -> None:
        """Start the window at the last piece, provided that this has text of its own.

        Without any the next token would be decoded as the first of a text, which loses its space.
        """
        tail = self._window[self._fresh :]
        text = self._decode(tail) if self._fresh else ""
        if text:
            self._window, self._done = tail, len(text)
        self._fresh = len(self._window)

    def _emit(self, piece: str) -> str:
        piece = self._stops.push(piece)
        self.stopped = self._stops.found
        self._pieces.append(piece)
        return piece


class _Stops:
    """Cuts a growing text before the first stop string."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.found = False
        self._stops = stops
        self._held = ""  # the longest end of the text that begins a stop string

    @property
    def empty(self) -> bool:
        """Whether there is nothing to look for."""
        return not self._stops

    def hit(self, piece: str) -> tuple[int, int] | None:
        """(end, start) of the first stop string in the held text and `piece`."""
        text = self._held + piece
        places = ((text.find(stop), stop) for stop in self._stops)
        return min(
            ((start + len(stop), start) for start, stop in places if start >= 0), default=None
        )

    def push(self, piece: str) -> str:
        """The part of the text that no stop string can claim any more."""
        if not self._stops or not piece:
            return piece
        text = self._held + piece
        hit = self.hit(piece)
        if hit:
            self.found, self._held = True, ""
            return text[: hit[1]]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back: the text has ended, so no stop string comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
