"""The server under load beside `generate` without one: `python -m benchmarks.serve`."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import httpx
import psutil
import torch
import typer
from pydantic import BaseModel, ConfigDict

import lmi_multi
from benchmarks.load import Answered, load
from benchmarks.machine import Load, Watch, busy_at_start, machine, versions
from lmi_multi.demo.spoken import pairs

RESULTS = Path(__file__).parent / "results"
PROMPTS = 1024
WARM = 1 / 6  # of the time: caches and allocators have taken what they need
NEW_TOKENS = 64
MAX_TOKENS = 256  # so that the warm-up touches all of the cache

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Settings(BaseModel):
    """What was run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clients: int
    seconds: float
    max_batch: int
    threads: int


class Result(BaseModel):
    """What came of it. Times in seconds; `memory` in bytes by process, warm and at the end."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    date: str
    command: str
    machine: dict[str, str | int]
    versions: dict[str, str]
    settings: Settings
    answers: int
    wrong: list[str]
    tokens_per_second: float
    offline_tokens_per_second: list[float]
    first_token: dict[str, float]
    between_tokens: dict[str, float]
    whole: dict[str, float]
    memory: dict[str, tuple[int, int]]
    load: Load

    @property
    def ratio(self) -> float:
        """The server's throughput over that of `generate`, before and after it."""
        offline = self.offline_tokens_per_second
        return self.tokens_per_second / (sum(offline) / len(offline))


@app.command()
def main(
    clients: Annotated[int, typer.Option(help="that ask at once", min=1)] = 64,
    seconds: Annotated[float, typer.Option(min=1)] = 60.0,
    max_batch: Annotated[int, typer.Option(help="rows, of both", min=1)] = 32,
    threads: Annotated[int, typer.Option(help="of torch, for both", min=1)] = 1,
    results: Annotated[Path, typer.Option(help="folder of the result's files")] = RESULTS,
    name: Annotated[str, typer.Option(help="of the result's files")] = "cpu-serve",
    require: Annotated[float, typer.Option(help="fail if the ratio is below this")] = 0.0,
) -> None:
    """Serve the demo model to clients that stream one answer after the other.

    Each answer is compared with that of `generate`, whose speed on the same prompts is measured
    before and after.
    """
    if warning := busy_at_start():
        typer.echo(warning, err=True)
    settings = Settings(clients=clients, seconds=seconds, max_batch=max_batch, threads=threads)
    result = measure(settings)
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}.json"
    path.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    page = markdown(result)
    path.with_suffix(".md").write_text(page, encoding="utf-8")
    typer.echo(page)
    if result.wrong:
        raise SystemExit(f"{len(result.wrong)} answers are wrong, the first: {result.wrong[0]}")
    if result.ratio < require:
        raise SystemExit(f"{result.ratio:.2f} of generate's throughput is below {require}")


def measure(settings: Settings) -> Result:
    """Generate, serve, and generate again."""
    prompts = [spoken for spoken, _ in pairs(1, PROMPTS)]
    torch.set_num_threads(settings.threads)
    expected, before = offline(prompts, settings)
    with served(settings) as (url, process):
        watch, own = Watch(), _seconds(process)
        start = time.monotonic()
        found, memory = asyncio.run(_loaded(url, process, prompts, settings))
        other = watch.stop(_seconds(process) - own)
    _, after = offline(prompts, settings)
    wrong = [
        a.error or f"{prompts[a.prompt]!r}: {a.text!r} for {expected[a.prompt]!r}"
        for a in found
        if a.error or a.text != expected[a.prompt]
    ]
    end = start + settings.seconds
    right = [a for a in found if not a.error]
    return Result(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=shlex.join(("python", "-m", "benchmarks.serve", *sys.argv[1:])),
        machine=machine("cpu"),
        versions=versions(),
        settings=settings,
        answers=len(found),
        wrong=wrong[:20],
        tokens_per_second=sum(t < end for a in right for t in a.arrivals) / settings.seconds,
        offline_tokens_per_second=[before, after],
        first_token=_shares([a.arrivals[0] - a.start for a in right]),
        between_tokens=_shares(_gaps(right)),
        whole=_shares([a.arrivals[-1] - a.start for a in right]),
        memory=memory,
        load=other,
    )


def offline(prompts: Sequence[str], settings: Settings) -> tuple[list[str], float]:
    """The answers of `generate`, and its tokens a second over all prompts."""
    with lmi_multi.load(
        "demo", backend="cpu", max_batch=settings.max_batch, max_tokens=MAX_TOKENS
    ) as model:
        model.generate(prompts[: settings.max_batch], max_new_tokens=NEW_TOKENS)
        found = model.generate(prompts, max_new_tokens=NEW_TOKENS)
        return [str(c.text) for c in found], model.stats.tokens_per_second


@contextmanager
def served(settings: Settings) -> Iterator[tuple[str, psutil.Process]]:
    """A server on loopback that is ready: its address and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "lmi_multi", "serve", "demo", "--backend", "cpu"]
    command += ["--port", str(port), "--max-batch", str(settings.max_batch)]
    command += ["--max-tokens", str(MAX_TOKENS)]
    environment = os.environ | {"OMP_NUM_THREADS": str(settings.threads)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            while not _ready(url):
                if process.poll() is not None:
                    raise SystemExit(f"the server ended with {process.returncode}")
                time.sleep(0.1)
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ping").status_code == 200
    except httpx.TransportError:
        return False


async def _loaded(
    url: str, process: psutil.Process, prompts: Sequence[str], settings: Settings
) -> tuple[list[Answered], dict[str, tuple[int, int]]]:
    """The answers, and the memory of both processes, warm and at the end."""
    parameters = {"max_new_tokens": NEW_TOKENS}
    work = asyncio.create_task(load(url, prompts, settings.clients, settings.seconds, **parameters))
    await asyncio.sleep(settings.seconds * WARM)
    warm = _memory(process)
    await asyncio.sleep(settings.seconds * (1 - WARM))
    end = _memory(process)
    return await work, {name: (warm[name], end[name]) for name in warm}


def _memory(process: psutil.Process) -> dict[str, int]:
    """Bytes that belong to the server's process and to the engine's alone."""
    named = {"server": process, "engine": process.children()[0]}
    return {name: found.memory_full_info().uss for name, found in named.items()}


def _seconds(process: psutil.Process) -> float:
    """What the server and its engine have spent on processors."""
    times = [found.cpu_times() for found in (process, *process.children())]
    return sum(found.user + found.system for found in times)


def _gaps(answers: Sequence[Answered]) -> list[float]:
    return [b - a for one in answers for a, b in zip(one.arrivals, one.arrivals[1:], strict=False)]


def _shares(values: list[float]) -> dict[str, float]:
    return {"p50": median(values), "p99": quantiles(values, n=100)[98], "max": max(values)}


def markdown(result: Result) -> str:
    """The page."""
    own = result.settings
    offline = " and ".join(f"{speed:.0f}" for speed in result.offline_tokens_per_second)
    facts = result.machine
    times = [
        f"| {name} | {' | '.join(f'{value * 1e3:.0f}' for value in shares.values())} |"
        for name, shares in (
            ("the first token", result.first_token),
            ("between tokens", result.between_tokens),
            ("the whole answer", result.whole),
        )
    ]
    memory = [
        f"| {name} | {warm / 2**20:.1f} | {end / 2**20:.1f} | {(end - warm) / 2**20:+.1f} |"
        for name, (warm, end) in result.memory.items()
    ]
    noise = []
    if not result.load.quiet:
        noise = [
            f"**The machine was busy with other work ({result.load.others} of "
            f"{result.load.cores} cores): these figures are not to be relied on.**",
            "",
        ]
    return "\n".join(
        (
            "# The server under load",
            "",
            *noise,
            f"- Machine: {facts['processor']}, {facts['cores']} cores, {facts['memory_gib']} GiB; "
            f"{facts['system']}",
            f"- Versions: {', '.join(f'{n} {v}' for n, v in result.versions.items())}",
            f"- Date: {result.date}",
            f"- Made by: `{result.command}`",
            f"- Settings: demo model on the CPU, {own.clients} clients that stream one answer "
            f"after the other for {own.seconds:g} s on the same machine, {own.max_batch} rows, "
            f"torch with {own.threads} threads",
            f"- Answers: {result.answers}, of which {len(result.wrong)} differ from those of "
            "`generate`, are missing or failed",
            f"- Throughput: {result.tokens_per_second:.0f} tokens/s, {result.ratio:.2f} times "
            f"that of `generate` on the same prompts ({offline} tokens/s, before and after)",
            "",
            "| milliseconds | p50 | p99 | largest |",
            "| --- | --: | --: | --: |",
            *times,
            "",
            f"| memory, MiB | after {own.seconds * WARM:g} s | at the end | growth |",
            "| --- | --: | --: | --: |",
            *memory,
            "",
        )
    )


if __name__ == "__main__":
    app()
