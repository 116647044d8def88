"""What the OpenAPI page says of requests and answers beyond what FastAPI finds out by itself."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

Json = dict[str, Any]

JSON_LINES, EVENTS = "application/jsonlines", "text/event-stream"

_REASONS = {
    400: "what is wrong with the request, by field",
    404: "there is no such model",
    408: "the body did not come",
    409: "the name is taken",
    413: "the body is too large",
    499: "the client went away",
    500: "this request failed, as with a numerical error",
    503: "no room, or no engine, now: try again after Retry-After seconds",
    504: "no whole answer in time",
    507: "memory is short",
}
_OF_MODELS = (409, 507)  # where models come and go
_STRING, _INTEGER = {"type": "string"}, {"type": "integer"}
_NULL_OR_STRING = {"type": ["string", "null"]}


def _object(**properties: Json) -> Json:
    """An object in which all of these have to be."""
    return {"type": "object", "properties": properties, "required": [*properties]}


def _list(of: Json) -> Json:
    return {"type": "array", "items": of}


PLAIN_ERROR = _object(error=_STRING, code=_INTEGER)
OPENAI_ERROR = _object(
    error=_object(message=_STRING, type=_STRING, param=_NULL_OR_STRING, code=_INTEGER)
)
_VECTOR = _list({"type": "number"})
_GENERATED = _object(generated_text=_STRING)
_USAGE = {"type": "object", "additionalProperties": _INTEGER}


def _listing(kind: str, entry: Json, **more: Json) -> Json:
    return _object(object={"const": kind}, data=_list(entry), **more)


def _completed(**choice: Json) -> Json:
    """The answer to either kind of completion."""
    one = _object(index=_INTEGER, finish_reason=_NULL_OR_STRING, **choice)
    head = {"id": _STRING, "object": _STRING, "created": _INTEGER, "model": _STRING}
    return _object(**head, choices=_list(one), usage=_USAGE)


COMPLETION = _completed(text=_STRING)
CHAT = _completed(message=_object(role=_STRING, content=_STRING))
EMBEDDINGS = _listing(
    "list",
    _object(index=_INTEGER, embedding={"anyOf": [_VECTOR, _STRING]}),
    model=_STRING,
    usage=_USAGE,
)
MODEL = _object(id=_STRING, object=_STRING, created=_INTEGER, owned_by=_STRING)
MODELS = _listing("list", MODEL)
LOADED = _object(modelName=_STRING, modelUrl=_STRING)
LOADED_PAGE = {
    "type": "object",
    "properties": {"models": _list(LOADED), "nextPageToken": _STRING},
    "required": ["models"],
}
UNLOADED = _object(modelName=_STRING)
INVOKED = {
    "anyOf": [_GENERATED, _list(_GENERATED), _VECTOR, _list(_VECTOR), COMPLETION, CHAT],
    "description": "One answer or a list of them; vectors of an encoder.",
}


def answers(
    whole: Json, error: Json, streams: tuple[str, ...] = (), of_models: bool = False
) -> dict[int | str, Json]:
    """FastAPI's `responses` of a route: a whole answer, streams of lines, and errors; `of_models`
    where models come and go."""
    kinds = {"application/json": {"schema": whole}} | {kind: {} for kind in streams}
    failed = {"application/json": {"schema": error}}
    found: dict[int | str, Json] = {200: {"description": "the answer", "content": kinds}}
    for status, reason in _REASONS.items():
        if status in _OF_MODELS and not of_models:
            continue
        found[status] = {"description": reason, "content": failed}
    return found


def request(*kinds: type[BaseModel], texts: tuple[str, ...] = ()) -> Json:
    """FastAPI's `openapi_extra` of a route: its body is one of `kinds`, or a text as named."""
    schemas = [_inlined(kind.model_json_schema()) for kind in kinds]
    content: Json = {"application/json": {"schema": {"anyOf": schemas}}}
    content |= {kind: {"schema": _STRING} for kind in texts}
    return {"requestBody": {"content": content, "required": True}}


def _inlined(schema: Json) -> Json:
    """The schema without `$defs`, whose references would point outside of the page."""
    parts = schema.pop("$defs", {})

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return walk(parts[value["$ref"].rsplit("/", 1)[-1]])
            return {key: walk(entry) for key, entry in value.items()}
        return [walk(entry) for entry in value] if isinstance(value, list) else value

    return dict(walk(schema))
