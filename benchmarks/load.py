"""Clients that ask a server for one answer after the other, each on a connection of its own."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Answered:
    """One answer: which prompt's, when it was asked for, what came, of how many tokens, and when
    its parts did (`time.monotonic`). `error` is what was wrong instead."""

    prompt: int
    start: float
    text: str = ""
    tokens: int = 0
    arrivals: list[float] = field(default_factory=list)
    error: str = ""


async def load(
    url: str,
    prompts: Sequence[str],
    clients: int,
    seconds: float,
    stream: bool = True,
    **parameters: Any,
) -> list[Answered]:
    """Let `clients` ask `/invocations` for answers for `seconds`, for the prompts in turn.

    Each finishes what it has begun, so it takes a little longer.
    """
    ask_one = _stream if stream else _whole
    numbers = itertools.cycle(range(len(prompts)))
    deadline = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    found: list[Answered] = []
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def ask(numbers: Iterator[int]) -> None:
            while time.monotonic() < deadline:
                answered = Answered(next(numbers), time.monotonic())
                found.append(answered)
                body = {"inputs": prompts[answered.prompt], "parameters": parameters}
                try:
                    await ask_one(client, body, answered)
                except httpx.HTTPError as error:
                    answered.error = f"{type(error).__name__}: {error}"

        await asyncio.gather(*(ask(numbers) for _ in range(clients)))
    return found


async def _stream(client: httpx.AsyncClient, body: dict[str, Any], answered: Answered) -> None:
    async with client.stream("POST", "/invocations", json=body | {"stream": True}) as response:
        if response.status_code != 200:
            answered.error = f"{response.status_code}: {(await response.aread()).decode()}"
            return
        lines = []
        async for line in response.aiter_lines():
            answered.arrivals.append(time.monotonic())
            lines.append(line)
    answered.tokens = len(lines)
    last = json.loads(lines[-1] if lines else "{}")
    answered.text = last.get("generated_text", "")
    if "generated_text" not in last:
        answered.error = f"the stream ended with {last}"


async def _whole(client: httpx.AsyncClient, body: dict[str, Any], answered: Answered) -> None:
    parameters = body["parameters"] | {"details": True}
    response = await client.post("/invocations", json=body | {"parameters": parameters})
    answered.arrivals.append(time.monotonic())
    if response.status_code != 200:
        answered.error = f"{response.status_code}: {response.text}"
        return
    found = response.json()
    answered.text, answered.tokens = found["generated_text"], found["details"]["generated_tokens"]
