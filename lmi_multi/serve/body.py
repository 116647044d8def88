"""From a request's bytes to a checked object."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lmi_multi.serve.errors import HttpError

PATIENCE = 30.0  # seconds without a byte after which a client counts as gone
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # the only way in for strings that are no Unicode

if TYPE_CHECKING:  # the handler for DJL Serving does without starlette
    from starlette.requests import Request

_Body = TypeVar("_Body", bound="Body")


async def read(request: Request, limit: int) -> bytes:
    """The body. Raises HttpError 413 beyond `limit` bytes, before any more is read, 408 when
    nothing comes for `PATIENCE` seconds, and 499 where the client goes away before its end."""
    from starlette.requests import ClientDisconnect  # which DJL Serving's handler does without

    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    stream = request.stream()
    try:
        while (part := await asyncio.wait_for(anext(stream, None), PATIENCE)) is not None:
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
    except asyncio.TimeoutError:  # another class than the built-in one before Python 3.11
        raise HttpError(408, f"no more of the body came within {PATIENCE:g} s") from None
    except ClientDisconnect:
        raise HttpError(499, "the client has gone") from None
    return b"".join(parts)


def parse(data: bytes) -> Any:
    """JSON as Python values. Raises HttpError 400 for anything else: NaN, Infinity, strings that
    are no Unicode and names that an object has twice included."""
    try:
        text = data.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_once)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError:
        raise HttpError(400, "the body has half a surrogate pair in a string") from None
    except UnicodeDecodeError as error:
        raise HttpError(400, f"the body is no UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise HttpError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise HttpError(400, f"the body is no JSON: {error}") from None


class Body(BaseModel):
    """What a request may say. A body can be wrong in a million places: the first is enough."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _only_known_names(cls, value: Any) -> Any:
        """Before the fields: a missing one is often an unknown one, misspelt."""
        for name in value if isinstance(value, dict) else ():
            if name not in cls.model_fields:
                known = ", ".join(cls.model_fields)
                raise PydanticCustomError("unknown", "", {"name": name, "known": known})
        return value


def _prompts(value: Any) -> Any:
    """`value`, if it is as `Prompts` says. pydantic's own check keeps what is wrong with each of a
    million ids as a string, as a list, and so on."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not (
        all(isinstance(entry, str) for entry in value)
        or _ids(value)
        or all(isinstance(entry, list) and _ids(entry) for entry in value)
    ):
        raise ValueError("no prompts")
    return value


def _ids(value: list[Any]) -> bool:
    return all(type(entry) is int for entry in value)  # a bool is none


_AnyPrompts = str | list[str] | list[int] | list[list[int]]
Prompts = Annotated[
    _AnyPrompts,
    PlainValidator(_prompts, json_schema_input_type=_AnyPrompts),
    Field(description="a string, a list of strings, a list of token ids, or a list of such lists"),
]
"""One prompt or several. An error says what a field's description allows."""


def check(kind: type[_Body], value: Any) -> _Body:
    """`value` as a `kind`. Raises HttpError 400 that names the field."""
    if not isinstance(value, dict):
        raise HttpError(400, f"the body is a {type(value).__name__}, must be a JSON object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
    loc = [str(part) for part in first["loc"]]
    if first["type"] == "unknown":
        path = f"{'.'.join([*loc, first['ctx']['name']]):.80}"
        raise HttpError(400, f"unknown field {path!r}; known: {first['ctx']['known']}", path)
    if first["type"] == "missing":
        path = ".".join(loc)
        raise HttpError(400, f"{path}: {first['msg']}", path)
    if (allowed := kind.model_fields[loc[0]].description) is not None:
        given = f"{value[loc[0]]!r:.80}"
        raise HttpError(400, f"{loc[0]} is {given}; allowed: {allowed}", loc[0])
    path = f"{'.'.join(loc):.80}"
    raise HttpError(400, f"{path} is {first['input']!r:.80}: {first['msg']}", path)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        shown = name[:80].encode("utf-8", "replace").decode()
        raise HttpError(400, f"{shown!r:.80} is given twice in an object; allowed: once", shown)
    return found


def _too_large(limit: int) -> HttpError:
    return HttpError(413, f"the body is larger than {limit} bytes")
