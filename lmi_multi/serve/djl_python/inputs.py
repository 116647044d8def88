"""What a handler is asked: `djl_python.inputs`."""

from __future__ import annotations

import json
from typing import Any

from lmi_multi.serve.djl_python.pair_list import PairList


class Input:
    """One request; without content it is the call that lets a handler load its
    model. Properties are the model's options, and the request's headers."""

    def __init__(self) -> None:
        self.function_name: str | None = None
        self.properties: dict[str, str] = {}
        self.content = PairList()

    def get_function_name(self) -> str | None:
        """The function that is called; None for `handle`."""
        return self.function_name

    def get_properties(self) -> dict[str, str]:
        """All properties."""
        return self.properties

    def get_property(self, key: str) -> str | None:
        """The property `key`, in any case; None if there is none."""
        named = {name.lower(): value for name, value in self.properties.items()}
        return named.get(key.lower())

    def is_batch(self) -> bool:
        """Whether several requests came together: here every request is a call of its own."""
        return False

    def get_batch_size(self) -> int:
        """How many requests came together."""
        return 1

    def get_batches(self) -> list[Input]:
        """The requests, one an entry."""
        return [self]

    def get_content(self) -> PairList:
        """All contents."""
        return self.content

    def contains_key(self, key: str) -> bool:
        """Whether a content goes by this key."""
        return self.content.get(key) is not None

    def is_empty(self) -> bool:
        """Whether this is the call to load the model."""
        return self.content.is_empty()

    def get_as_bytes(self, key: str | None = None) -> bytes | None:
        """The content `key`; without one the request's body. None of an empty input. Raises
        KeyError for an unknown key."""
        if self.content.is_empty():
            return None
        if key:
            value = self.content.get(key)
            if value is None:
                raise KeyError(f"the input has no content {key!r}")
            return value
        value = self.content.get("data")
        return self.content.value_at(0) if value is None else value

    def get_as_string(self, key: str | None = None) -> str:
        """The same as text. Raises UnicodeDecodeError for what is no UTF-8."""
        return (self.get_as_bytes(key) or b"").decode("utf-8")

    def get_as_json(self, key: str | None = None) -> Any:
        """The same as values. Raises ValueError for what is no JSON."""
        return json.loads(self.get_as_string(key))
