"""Where `generate` takes its prompts from: arguments, a file, standard input, or token ids."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TypeAlias

from lmi_multi.errors import OptionError

Prompts: TypeAlias = "list[str] | list[list[int]]"


def read_prompts(arguments: list[str], file: Path | None, token_ids: list[str]) -> Prompts:
    """The prompts of one command line, from exactly one place; at least one."""
    given = [bool(arguments), file is not None, bool(token_ids)]
    if sum(given) > 1:
        raise OptionError("prompts come from one place: arguments, --file or --token-ids")
    if token_ids:
        return [parse_ids(text) for text in token_ids]
    if arguments:
        return arguments
    if file is not None and str(file) != "-":
        return _lines(_read(file), str(file))
    return _lines(_read_stdin(), "standard input")


def parse_ids(text: str) -> list[int]:
    """'1, 2, 3' as numbers."""
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"--token-ids {text!r}: expected numbers such as '1,2,3'") from None
    if min(ids) < 0:
        raise OptionError(f"--token-ids {text!r}: {min(ids)} is negative")
    return ids


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise OptionError(f"--file {file}: {error.strerror}") from None


def _read_stdin() -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise OptionError("no prompt: give one as an argument, by --file, or on standard input")
    return sys.stdin.buffer.read()


def _lines(data: bytes, name: str) -> list[str]:
    """One prompt a line; blank lines are skipped."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise OptionError(f"{name}: line {number} is not UTF-8 text") from None
    # Split at newlines only: `splitlines` would also cut prompts at form feeds and U+2028.
    prompts: list[str] = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not prompts:
        raise OptionError(f"no prompt: {name} is empty")
    return prompts
