"""Asks an endpoint: whole answers, and streams of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from lmi_multi.deploy.aws import RUNTIME, failure, make_client
from lmi_multi.deploy.deployment import check_name
from lmi_multi.errors import AwsError

MAX_LINE = 2**24  # bytes of one line of a stream: more is no answer of ours


def invoke(endpoint: str, body: dict[str, Any]) -> Any:
    """The endpoint's answer to `body`, as `POST /invocations` gives it. Raises AwsError."""
    check_name(endpoint)
    try:
        answer = make_client(RUNTIME).invoke_endpoint(
            EndpointName=endpoint,
            ContentType="application/json",
            Accept="application/json",
            Body=json.dumps(body).encode(),
        )
        data = answer["Body"].read()
    except (BotoCoreError, ClientError) as error:
        raise failure(error, f"endpoint {endpoint}") from None
    return _parsed(data, endpoint)


def stream(endpoint: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The lines of the endpoint's stream as they come: `token`, and in the last `generated_text`.

    Raises AwsError, also for an error within the stream, and for one that breaks off.
    """
    check_name(endpoint)
    finished = False
    try:
        answer = make_client(RUNTIME).invoke_endpoint_with_response_stream(
            EndpointName=endpoint,
            ContentType="application/json",
            Accept="application/jsonlines",
            Body=json.dumps(body | {"stream": True}).encode(),
        )
        for line in _lines(answer["Body"], endpoint):
            event = _parsed(line, endpoint)
            if not isinstance(event, dict) or "error" in event:
                said = event["error"] if isinstance(event, dict) else event
                raise AwsError(f"endpoint {endpoint}: {said!s:.500}")
            finished = finished or "generated_text" in event
            yield event
    except (BotoCoreError, ClientError) as error:
        raise failure(error, f"endpoint {endpoint}") from None
    if not finished:
        raise AwsError(f"endpoint {endpoint}: the stream ends before its answer does")


def _lines(events: Any, endpoint: str) -> Iterator[bytes]:
    """Lines out of parts, which are cut anywhere."""
    rest = b""
    for event in events:
        *whole, rest = (rest + event.get("PayloadPart", {}).get("Bytes", b"")).split(b"\n")
        yield from filter(None, whole)
        if len(rest) > MAX_LINE:
            raise AwsError(f"endpoint {endpoint}: a line of more than {MAX_LINE} bytes")
    if rest:
        yield rest


def _parsed(data: bytes, endpoint: str) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise AwsError(f"endpoint {endpoint} answers no JSON: {data[:200]!r}") from None
