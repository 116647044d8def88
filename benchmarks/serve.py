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
from statistics import mean, median, quantiles
from typing import Annotated

import httpx
import psutil
import torch
import typer
from pydantic import BaseModel, ConfigDict

import lmi_multi
from benchmarks.load import Answered, load
from benchmarks.machine import QUIET, Watch, busy_at_start, machine, versions
from lmi_multi.demo.spoken import pairs

RESULTS = Path(__file__).parent / "results"
PROMPTS = 1024
WARM = 10.0  # seconds of load that do not count: caches and allocators take what they need
NEW_TOKENS = 64
MAX_TOKENS = 256  # so that the warm-up touches all of the cache

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Settings(BaseModel):
    """What was run; `seconds` of load in all, in so many `rounds`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clients: int
    seconds: float
    rounds: int
    stream: bool
    max_batch: int
    threads: int


class Round(BaseModel):
    """One period of load, between two runs of `generate`. `others` are the cores that were busy
    with other work; `cpu` is in microseconds a token, by process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens_per_second: float
    generate: tuple[float, float]
    others: float
    cpu: dict[str, float]

    @property
    def ratio(self) -> float:
        """The server's throughput over that of `generate`, before and after it."""
        return self.tokens_per_second / mean(self.generate)


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
    rounds: list[Round]
    first_token: dict[str, float]
    between_tokens: dict[str, float]
    whole: dict[str, float]
    memory: dict[str, tuple[int, int]]

    @property
    def ratio(self) -> float:
        """The median round's."""
        return median(r.ratio for r in self.rounds)


@app.command()
def main(
    clients: Annotated[int, typer.Option(help="that ask at once", min=1)] = 64,
    seconds: Annotated[float, typer.Option(help="of load in all", min=1)] = 60.0,
    rounds: Annotated[int, typer.Option(help="that it is divided into", min=1)] = 6,
    stream: Annotated[bool, typer.Option(help="answers, or ask for whole ones")] = True,
    max_batch: Annotated[int, typer.Option(help="rows, of both", min=1)] = 32,
    threads: Annotated[int, typer.Option(help="of torch, for both", min=1)] = 1,
    results: Annotated[Path, typer.Option(help="folder of the result's files")] = RESULTS,
    name: Annotated[str, typer.Option(help="of the result's files")] = "cpu-serve",
    require: Annotated[float, typer.Option(help="fail if the ratio is below this")] = 0.0,
) -> None:
    """Serve the demo model to clients that ask for one answer after the other.

    Each answer is compared with that of `generate`, whose speed on the same prompts is measured
    between the rounds: both are warm, have the same threads, and rest while the other one works.
    """
    if warning := busy_at_start():
        typer.echo(warning, err=True)
    settings = Settings(
        clients=clients,
        seconds=seconds,
        rounds=rounds,
        stream=stream,
        max_batch=max_batch,
        threads=threads,
    )
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
    """Serve and generate in turns."""
    prompts = [spoken for spoken, _ in pairs(1, PROMPTS)]
    torch.set_num_threads(settings.threads)
    with (
        lmi_multi.load(
            "demo", backend="cpu", max_batch=settings.max_batch, max_tokens=MAX_TOKENS
        ) as model,
        served(settings) as (url, process),
    ):
        return Bench(model, url, process, prompts, settings).run()


class Bench:
    """A model and a server, both warm in the end of `__init__`."""

    def __init__(
        self,
        model: lmi_multi.Model,
        url: str,
        server: psutil.Process,
        prompts: Sequence[str],
        settings: Settings,
    ) -> None:
        self.model, self.url, self.prompts, self.settings = model, url, prompts, settings
        self.processes = {
            "generate and clients": psutil.Process(),
            "server": server,
            "engine": server.children()[0],
        }
        self.expected = [str(c.text) for c in model.generate(prompts, max_new_tokens=NEW_TOKENS)]
        self._load(min(WARM, settings.seconds))

    def run(self) -> Result:
        """All rounds."""
        settings = self.settings
        memory = self._memory()
        generate = [self._generate()]
        loads: list[tuple[float, float, dict[str, float]]] = []
        found: list[Answered] = []
        for _ in range(settings.rounds):
            answered, rate, taken, spent = self._load(settings.seconds / settings.rounds)
            found += answered
            loads.append((rate, taken, spent))
            generate.append(self._generate())
        end = self._memory()
        right = [a for a in found if not a.error]
        wrong = [
            a.error or f"{self.prompts[a.prompt]!r}: {a.text!r} for {self.expected[a.prompt]!r}"
            for a in found
            if a.error or a.text != self.expected[a.prompt]
        ]
        return Result(
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=shlex.join(("python", "-m", "benchmarks.serve", *sys.argv[1:])),
            machine=machine("cpu"),
            versions=versions(),
            settings=settings,
            answers=len(found),
            wrong=wrong[:20],
            rounds=[
                Round(
                    tokens_per_second=speed,
                    generate=(before[0], after[0]),
                    others=others,
                    cpu=cpu | {"generate": mean((before[1], after[1]))},
                )
                for (speed, others, cpu), before, after in zip(
                    loads, generate[:-1], generate[1:], strict=True
                )
            ],
            first_token=_shares([a.arrivals[0] - a.start for a in right]),
            between_tokens=_shares(_gaps(right) or [0.0, 0.0]),
            whole=_shares([a.arrivals[-1] - a.start for a in right]),
            memory={name: (memory[name], end[name]) for name in ("server", "engine")},
        )

    def _generate(self) -> tuple[float, float]:
        """Tokens a second of `generate` over all prompts, and microseconds of CPU a token."""
        start = time.process_time()
        self.model.generate(self.prompts, max_new_tokens=NEW_TOKENS)
        stats = self.model.stats
        spent = time.process_time() - start
        return stats.tokens_per_second, spent / stats.generated_tokens * 1e6

    def _load(self, seconds: float) -> tuple[list[Answered], float, float, dict[str, float]]:
        """The answers; tokens a second until the time is up, beginning with an idle server; what
        others took of the cores; and microseconds of CPU a token, by process."""
        watch, before, start = Watch(), self._cpu(), time.monotonic()
        parameters = {"max_new_tokens": NEW_TOKENS}
        clients, stream = self.settings.clients, self.settings.stream
        found = asyncio.run(
            load(self.url, self.prompts, clients, seconds, stream=stream, **parameters)
        )
        spent = {name: now - before[name] for name, now in self._cpu().items()}
        others = watch.stop(spent["server"] + spent["engine"]).others
        tokens = sum(a.tokens for a in found)
        named = {"clients": spent.pop("generate and clients")} | spent
        cpu = {name: value / max(tokens, 1) * 1e6 for name, value in named.items()}
        return found, self._counted(found, start + seconds) / seconds, others, cpu

    def _counted(self, found: Sequence[Answered], end: float) -> float:
        """Tokens that came until `end`; of whole answers that came later the part of their time
        that was before it."""
        tokens = 0.0
        for own in found:
            if own.error:
                continue
            if self.settings.stream:
                tokens += sum(arrival < end for arrival in own.arrivals)
            else:
                took = own.arrivals[-1] - own.start
                tokens += own.tokens * min(1.0, (end - own.start) / took)
        return tokens

    def _memory(self) -> dict[str, int]:
        """Bytes that belong to each process alone."""
        return {name: p.memory_full_info().uss for name, p in self.processes.items()}

    def _cpu(self) -> dict[str, float]:
        """Seconds that each process has spent on processors."""
        times = {name: process.cpu_times() for name, process in self.processes.items()}
        return {name: found.user + found.system for name, found in times.items()}


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


def _gaps(answers: Sequence[Answered]) -> list[float]:
    return [b - a for one in answers for a, b in zip(one.arrivals, one.arrivals[1:], strict=False)]


def _shares(values: list[float]) -> dict[str, float]:
    return {"p50": median(values), "p99": quantiles(values, n=100)[98], "max": max(values)}


def markdown(result: Result) -> str:
    """The page."""
    own, facts = result.settings, result.machine
    how = "stream" if own.stream else "get, whole,"
    times = [
        f"| {name} | {' | '.join(f'{value * 1e3:.0f}' for value in shares.values())} |"
        for name, shares in (
            ("the first token", result.first_token),
            ("between tokens", result.between_tokens),
            ("the whole answer", result.whole),
        )
        if own.stream or name == "the whole answer"
    ]
    memory = [
        f"| {name} | {warm / 2**20:.1f} | {end / 2**20:.1f} | {(end - warm) / 2**20:+.1f} |"
        for name, (warm, end) in result.memory.items()
    ]
    names = ("generate", "engine", "server", "clients")
    rounds = [
        f"| {r.generate[0]:.0f}, {r.generate[1]:.0f} | {r.tokens_per_second:.0f} | {r.ratio:.2f} | "
        f"{r.others:.2f} | {' | '.join(f'{r.cpu[name]:.0f}' for name in names)} |"
        for r in result.rounds
    ]
    quiet = sum(r.others <= QUIET * int(facts["cores"]) for r in result.rounds)
    noise = []
    if quiet < len(result.rounds):
        noise = [
            f"**In {len(result.rounds) - quiet} of {len(result.rounds)} rounds the machine was "
            "busy with other work: see `others`, the cores that this took.**",
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
            f"- Settings: demo model on the CPU, {own.clients} clients that {how} one answer "
            f"after the other on the same machine, {own.seconds:g} s in {own.rounds} rounds; "
            f"{own.max_batch} rows, torch with {own.threads} threads, for `generate` as well, "
            "which runs between the rounds, over the same prompts; both have done the same before",
            f"- Answers: {result.answers}, of which {len(result.wrong)} differ from those of "
            "`generate`, are missing or failed",
            f"- Throughput: {result.ratio:.2f} times that of `generate` (median of the rounds)",
            "",
            "| generate before, after, tokens/s | server, tokens/s | ratio | others, cores "
            "| CPU us/token: generate | engine | server | clients |",
            "| --- | --: | --: | --: | --: | --: | --: | --: |",
            *rounds,
            "",
            "| milliseconds | p50 | p99 | largest |",
            "| --- | --: | --: | --: |",
            *times,
            "",
            "| memory, MiB | warm | at the end | growth |",
            "| --- | --: | --: | --: |",
            *memory,
            "",
        )
    )


if __name__ == "__main__":
    app()
