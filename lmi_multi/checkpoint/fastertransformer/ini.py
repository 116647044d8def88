"""A `config.ini` as FasterTransformer's converters write it: typed access, errors name the key."""

from __future__ import annotations

import configparser
import math
from pathlib import Path

import torch

from lmi_multi.errors import CheckpointError, UnsupportedModelError

NAME = "config.ini"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_FLAGS = configparser.ConfigParser.BOOLEAN_STATES
_MOST = 2**31 - 1  # its own readers hold every number in 32 bits


class Ini:
    """The settings of one model. A value `None`, as Python writes it, counts as absent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._parser = configparser.ConfigParser(interpolation=None)
        try:
            self._parser.read_string(path.read_text(encoding="utf-8"), str(path))
        except (OSError, ValueError, configparser.Error) as error:
            cause = " ".join(str(error).split())
            raise CheckpointError(f"{path} cannot be read as settings: {cause:.200}") from None

    @property
    def sections(self) -> list[str]:
        """The names of the sections that hold anything."""
        return [name for name in self._parser.sections() if self._parser.options(name)]

    def value(self, section: str, key: str) -> str | None:
        """The text of a setting, None where it is absent."""
        text = self._parser.get(section, key, fallback="None").strip()
        return None if text in ("", "None") else text

    def text(self, section: str, key: str, default: str | None = None) -> str:
        """The text of a setting. Raises CheckpointError where it is absent without a default."""
        text = self.value(section, key)
        if text is None:
            text = default
        if text is None:
            raise CheckpointError(f"{self.path}: [{section}] {key} is missing")
        return text

    def size(self, section: str, key: str) -> int:
        """A number of things, at least 1."""
        number = self.whole(section, key)
        if number is None:
            raise CheckpointError(f"{self.path}: [{section}] {key} is missing")
        if number < 1:
            raise CheckpointError(f"{self.path}: [{section}] {key} is {number}, must be above 0")
        return number

    def whole(self, section: str, key: str, default: int | None = None) -> int | None:
        """An integer, `default` where it is absent."""
        text = self.value(section, key)
        try:
            number = default if text is None else int(text)
        except ValueError:
            number = _MOST + 1
        if number is not None and abs(number) > _MOST:
            raise self._wrong(section, key, "an integer of 32 bits")
        return number

    def number(self, section: str, key: str, default: float) -> float:
        """A positive number, `default` where it is absent."""
        text = self.value(section, key)
        try:
            number = default if text is None else float(text)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise self._wrong(section, key, "a number above 0")
        return number

    def flag(self, section: str, key: str, default: bool) -> bool:
        """A truth value, `default` where it is absent."""
        text = self.value(section, key)
        if text is None:
            return default
        if text.lower() not in _FLAGS:
            raise self._wrong(section, key, "true or false")
        return _FLAGS[text.lower()]

    def dtype(self, section: str) -> torch.dtype:
        """What the files' numbers are, by `weight_data_type`."""
        name = self.text(section, "weight_data_type")
        if name not in DTYPES:
            raise self._wrong(section, "weight_data_type", f"one of {', '.join(DTYPES)}")
        return DTYPES[name]

    def forbid(self, section: str, **allowed: str | int | bool) -> None:
        """Refuse settings that make another network; absent ones have the allowed value."""
        for key, value in allowed.items():
            actual: str | int | bool | None
            if isinstance(value, bool):
                actual = self.flag(section, key, value)
            elif isinstance(value, int):
                actual = self.whole(section, key, value)
            else:
                actual = self.text(section, key, value)
            if actual != value:
                raise UnsupportedModelError(
                    f"{self.path}: [{section}] {key} is {self.value(section, key)!r:.80}; "
                    f"only {value!r} is supported"
                )

    def _wrong(self, section: str, key: str, allowed: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: [{section}] {key} is {self.value(section, key)!r:.80}, must be {allowed}"
        )
