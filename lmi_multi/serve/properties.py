"""Reads Java .properties files, as DJL Serving's users write them.

Java's own reader takes any file. This one refuses what can only be a mistake: a name that comes
twice, a name alone, a value without a name, an escape that is none, a last line that goes on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from lmi_multi.errors import OptionError

MAX_BYTES = 2**20
"""A larger file is no configuration."""

_BLANK = " \t\f"
_LINE_END = re.compile(r"\r\n|\r|\n")
_NAME = re.compile(r"(?:[^\\=: \t\f]|\\.)*", re.DOTALL)
_SEPARATOR = re.compile(r"[ \t\f]*[=:]?[ \t\f]*")
_TRAILING_BACKSLASHES = re.compile(r"\\*\Z")
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_LETTERS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}


def read(path: Path) -> dict[str, str]:
    """The names and values of the file at `path`. Raises OptionError: what, and in which line."""
    return parse(_text(path), str(path))


def parse(text: str, file: str = "serving.properties") -> dict[str, str]:
    """The names and values in `text`; errors call it `file`."""
    found: dict[str, str] = {}
    first: dict[str, int] = {}
    for number, line in _logical_lines(text, file):
        name, value = _pair(line, f"{file}, line {number}")
        if name in first:
            raise OptionError(
                f"{file}, line {number}: {name} is given twice, first in line {first[name]}; "
                "allowed: once"
            )
        found[name], first[name] = value, number
    return found


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        reason = getattr(error, "strerror", None) or error
        raise OptionError(f"the file {path} cannot be read: {reason}") from None
    if len(data) > MAX_BYTES:
        raise OptionError(f"the file {path} is too large; allowed: {MAX_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Line ends are the same bytes in every encoding that such a file could have.
        number = len(_LINE_END.findall(data[: error.start].decode("latin-1"))) + 1
        raise OptionError(f"{path}, line {number}: not UTF-8") from None


def _logical_lines(text: str, file: str) -> Iterator[tuple[int, str]]:
    """Lines that say something, with the number each begins at; continuations are joined."""
    begun, start = "", 0
    number = 0
    ended = _LINE_END.sub("\n", text).removesuffix("\n")  # the last line's end begins no other
    for number, natural in enumerate(ended.split("\n"), 1):
        stripped = natural.lstrip(_BLANK)
        if not start and (not stripped or stripped[0] in "#!"):
            continue
        begun, start = begun + stripped, start or number
        if _goes_on(stripped):
            begun = begun[:-1]
            continue
        yield start, begun
        begun, start = "", 0
    if start:
        raise OptionError(f"{file}, line {number}: the file ends where a line should go on")


def _goes_on(line: str) -> bool:
    """Whether an odd number of backslashes ends it: two of them are one that is meant."""
    found = _TRAILING_BACKSLASHES.search(line)
    return found is not None and len(found.group()) % 2 == 1


def _pair(line: str, where: str) -> tuple[str, str]:
    end = _match_end(_NAME, line, 0)
    name = _unescape(line[:end], where)
    if not name:
        raise OptionError(f"{where}: a value without a name; allowed: NAME=VALUE")
    if end == len(line):
        raise OptionError(f"{where}: {name} has no value; allowed: NAME=VALUE")
    return name, _unescape(line[_match_end(_SEPARATOR, line, end) :], where)


def _match_end(pattern: re.Pattern[str], line: str, start: int) -> int:
    found = pattern.match(line, start)
    return found.end() if found else start


def _unescape(text: str, where: str) -> str:
    def character(found: re.Match[str]) -> str:
        code = found.group(1)
        if code == "u":
            raise OptionError(f"{where}: \\u without four hexadecimal digits")
        return chr(int(code[1:], 16)) if len(code) > 1 else _LETTERS.get(code, code)

    # Java's characters are 16 bits wide: two escapes can be one character.
    halves = _ESCAPE.sub(character, text)
    try:
        return halves.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise OptionError(f"{where}: \\u of half a character") from None
