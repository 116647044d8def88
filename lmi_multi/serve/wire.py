"""What the server and its engine process say to each other: JSON over a private pipe.

JSON, not pickle: whatever one side says, the other only gets data. From the server come `submit`,
`embed` and `cancel`, to a script `invoke`; from the engine `ready` once, then a message for each
step with its chunks, whose prompts left the queue and when (nanoseconds since 1970), whose have
their first token, and whose have ended; its `state` after a `cancel`, answers to `embed` and
`invoke`, refusals, and `broken` before it ends as it cannot go on.
"""

from __future__ import annotations

import base64
import json
from multiprocessing.connection import Connection
from typing import Any

from lmi_multi.completion import TokenLogprob
from lmi_multi.streaming import Chunk

Message = dict[str, Any]


def send(pipe: Connection, message: Message) -> None:
    """Raises OSError when nobody listens any more."""
    pipe.send_bytes(json.dumps(message, separators=(",", ":")).encode())


def receive(pipe: Connection) -> Message:
    """Wait for a message. Raises EOFError or OSError when nobody speaks any more."""
    message: Message = json.loads(pipe.recv_bytes())
    return message


def text(content: bytes) -> str:
    """Any bytes as a JSON value; `content` is its inverse."""
    return base64.b64encode(content).decode("ascii")


def content(text: str) -> bytes:
    """The bytes that were made text."""
    return base64.b64decode(text)


def pack(chunk: Chunk) -> list[Any]:
    """A chunk as JSON values, but for its index; `unpack` is its inverse."""
    logprobs = None
    if chunk.logprobs is not None:
        logprobs = [[e.token_id, e.logprob, list(e.top.items())] for e in chunk.logprobs]
    return [
        *(chunk.text, chunk.token_ids, chunk.finish_reason, chunk.error),
        *(chunk.answer, logprobs, chunk.score),
    ]


def unpack(values: list[Any], index: int) -> Chunk:
    """The chunk that was packed, of prompt `index`."""
    text, token_ids, finish_reason, error, answer, logprobs, score = values
    entries = None
    if logprobs is not None:
        entries = [TokenLogprob(token, own, dict(top)) for token, own, top in logprobs]
    return Chunk(index, text, token_ids, finish_reason, error, answer, entries, score)
