"""What a handler answers: `djl_python.outputs`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lmi_multi.serve.djl_python.pair_list import PairList

Formatter = Callable[[Any], "str | bytes"]


class Output:
    """A status, properties, which become headers, and a content or a stream of them."""

    def __init__(self, code: int = 200, message: str = "OK") -> None:
        self.code, self.message = code, message
        self.properties: dict[str, str] = {}
        self.content = PairList()
        self._stream: tuple[Iterable[Any], Formatter] | None = None
        self._finalize: Callable[[], object] | None = None

    def set_code(self, code: int) -> Output:
        """The HTTP status."""
        self.code = code
        return self

    def set_message(self, message: str) -> Output:
        """The status in words."""
        self.message = message
        return self

    def error(self, error: str, code: int = 424, message: str = "prediction failure") -> Output:
        """Answer with an error."""
        self.code, self.message = code, message
        return self.add_as_json({"error": error, "code": code, "message": message})

    def add_property(self, key: str, val: str) -> Output:
        """Set a property."""
        self.properties[key] = val
        return self

    def add(self, value: Any, key: str | None = None, batch_index: int | None = None) -> Output:
        """Add text, bytes, or anything that JSON can say."""
        if isinstance(value, bytes | bytearray):
            return self._add(bytes(value), key, batch_index, "application/octet-stream")
        if isinstance(value, str):
            return self._add(value.encode(), key, batch_index, "text/plain; charset=utf-8")
        return self.add_as_json(value, key, batch_index)

    def add_as_json(
        self, val: Any, key: str | None = None, batch_index: int | None = None
    ) -> Output:
        """Add a value as JSON; arrays and numbers of numpy and torch too."""
        return self._add(_json(val).encode(), key, batch_index, "application/json")

    def add_stream_content(
        self, stream_content: Iterable[Any], output_formatter: Formatter | str | None = None
    ) -> Output:
        """Answer with each item of an iterator when it comes: as the formatter, which may be
        "jsonlines" or "sse", makes it text; without one, as a line of JSON."""
        if not callable(output_formatter):
            formatters = {None: _line, "json": _line, "jsonlines": _line, "sse": _event}
            if output_formatter not in formatters:
                raise ValueError(
                    f"output_formatter is {output_formatter!r:.80}; allowed: jsonlines, sse, or a "
                    "function"
                )
            kind = "text/event-stream" if output_formatter == "sse" else "application/jsonlines"
            self._say(kind)
            output_formatter = formatters[output_formatter]
        self._stream = (stream_content, output_formatter)
        return self

    def finalize(self, func: Callable[..., object], *args: Any, **kwargs: Any) -> Output:
        """Call `func` once the answer has gone."""
        self._finalize = lambda: func(*args, **kwargs)
        return self

    @property
    def streams(self) -> bool:
        """Whether the answer comes in parts."""
        return self._stream is not None

    def parts(self) -> Iterator[bytes]:
        """The parts of a stream."""
        if self._stream is None:
            return
        items, form = self._stream
        for item in items:
            part = form(item)
            yield part.encode() if isinstance(part, str) else bytes(part)

    def finished(self) -> None:
        """The answer has gone, or nobody wants it."""
        if self._finalize is not None:
            self._finalize()

    def _add(self, data: bytes, key: str | None, batch_index: int | None, kind: str) -> Output:
        if batch_index not in (None, 0):
            raise IndexError(f"batch_index is {batch_index}; allowed: 0, the only request")
        self._say(kind)
        self.content.add(key, data)
        return self

    def _say(self, kind: str) -> None:
        """Name the content's type, unless the handler has."""
        if not any(name.lower() == "content-type" for name in self.properties):
            self.properties["content-type"] = kind


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)


def _line(item: Any) -> str:
    return f"{_json(item)}\n"


def _event(item: Any) -> str:
    return f"data: {_json(item)}\n\n"


def _plain(value: Any) -> Any:
    """Arrays, tensors and their scalars as lists and numbers of Python."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is no JSON")
