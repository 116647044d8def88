"""From a request's bytes to a checked object."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from lmi_multi.serve.errors import HttpError

PATIENCE = 30.0  # seconds without a byte after which a client counts as gone
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # the only way in for strings that are no Unicode

if TYPE_CHECKING:  # the handler for DJL Serving does without starlette
    from starlette.requests import Request

_Model = TypeVar("_Model", bound=BaseModel)


async def read(request: Request, limit: int) -> bytes:
    """The body. Raises HttpError 413 beyond `limit` bytes, before any more is read, and 408 when
    nothing comes for `PATIENCE` seconds."""
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


def check(kind: type[_Model], value: Any) -> _Model:
    """`value` as a `kind`. Raises HttpError 400 that names the field."""
    if not isinstance(value, dict):
        raise HttpError(400, f"the body is a {type(value).__name__}, must be a JSON object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        # An unknown name first: a missing one is often the same, misspelt.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        path = f"{'.'.join(str(part) for part in first['loc']):.80}"
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields)
            raise HttpError(400, f"unknown field {path!r}; known: {known}", path) from None
        given = f" is {first['input']!r:.80}" if first["type"] != "missing" else ""
        raise HttpError(400, f"{path}{given}: {first['msg']}", path) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in found if names.count(name) > 1)
        shown = name.encode("utf-8", "replace").decode()
        raise HttpError(400, f"{shown!r:.80} is given twice in an object; allowed: once", shown)
    return found


def _too_large(limit: int) -> HttpError:
    return HttpError(413, f"the body is larger than {limit} bytes")
