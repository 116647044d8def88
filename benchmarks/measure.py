"""Runs the contenders in turns and notes every time."""

from __future__ import annotations

import gc
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import transformers
import typer

import lmi_multi
from benchmarks.contenders import OURS, PEERS, Contender, Ours
from benchmarks.machine import Watch, busy_at_start, copy_bandwidth, machine, versions
from benchmarks.result import Case, Result, Settings
from benchmarks.roofline import step_bytes
from benchmarks.shapes import checkpoint, prompts
from lmi_multi.checkpoint.artifact import Artifact


def measure(
    settings: Settings,
    shapes: list[str],
    dtypes: list[str],
    batches: list[int],
    peers: list[str],
    work: Path | None,
) -> Result:
    """Every case of `shapes` x `dtypes` x `batches`. Checkpoints are kept in `work`, if given.

    Exits with a message if a contender's answer has a wrong length, or if tokens differ in fp32.
    """
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if warning := busy_at_start():
        typer.echo(warning, err=True)
    bandwidth = copy_bandwidth(settings.device)
    cases = []
    with _folder(work) as folder:
        for shape in shapes:
            widest = "fp32" if "fp32" in dtypes else dtypes[0]
            source = checkpoint(shape, widest, settings.device, folder)
            for dtype in dtypes:
                target = folder / f"{shape}-{dtype}.artifact"
                artifact = lmi_multi.convert(source, target, dtype=dtype)
                with _contenders(source, artifact, settings.device, batches, peers) as entered:
                    cases += [_case(settings, shape, artifact, n, entered) for n in batches]
    return Result(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=shlex.join(("python", "-m", "benchmarks.decode", *sys.argv[1:])),
        machine=machine(settings.device),
        versions=versions(),
        settings=settings,
        contenders=[OURS, *peers],
        bytes_per_second=bandwidth,
        cases=cases,
    )


@contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    if work is None:
        with tempfile.TemporaryDirectory(prefix="lmi_multi-benchmark-") as folder:
            yield Path(folder)
    else:
        work.mkdir(parents=True, exist_ok=True)
        yield work


@contextmanager
def _contenders(
    source: Path, artifact: Artifact, device: str, batches: list[int], peers: list[str]
) -> Iterator[dict[str, Contender]]:
    """All of them loaded, ours first; freed at the end."""
    most = max(batches)
    entered: dict[str, Contender] = {}
    try:
        entered[OURS] = Ours(artifact.folder, artifact.dtype, device, most)
        for peer in peers:
            entered[peer] = PEERS[peer](source, artifact.dtype, device, most)
        yield entered
    finally:
        for contender in entered.values():
            contender.close()
        entered.clear()
        gc.collect()


def _case(
    settings: Settings, shape: str, artifact: Artifact, batch: int, entered: dict[str, Contender]
) -> Case:
    what = f"{shape} {artifact.dtype}, batch {batch}"
    given = prompts(artifact.spec.vocab, batch, settings.prompt_tokens)
    agreement = _warm_up(what, artifact.dtype, given, settings.new_tokens, entered)
    watch = Watch()
    first, whole = _take_turns(entered, given, settings.new_tokens, settings.rounds)
    case = Case(
        shape=shape,
        dtype=artifact.dtype,
        batch=batch,
        new_tokens=settings.new_tokens,
        step_bytes=step_bytes(artifact, batch, settings.prompt_tokens, settings.new_tokens),
        agreement=agreement,
        first_seconds=first,
        all_seconds=whole,
        load=watch.stop(),
    )
    steps = ", ".join(f"{name} {case.step(name) * 1e3:.2f} ms a step" for name in entered)
    typer.echo(f"{what}: {steps}{'' if case.load.quiet else ' (the machine is busy)'}", err=True)
    return case


def _warm_up(
    what: str, dtype: str, given: list[list[int]], new: int, entered: dict[str, Contender]
) -> dict[str, float]:
    """Run every contender once at each length; the share of each peer's tokens that equal ours.

    Exits if a length is wrong, or if tokens differ in fp32.
    """
    answers = {}
    for name, contender in entered.items():
        answers[name] = [token for row in contender.generate(given, new) for token in row]
        contender.generate(given, 1)
        if len(answers[name]) != new * len(given):
            raise SystemExit(f"{what}: {name} did not generate {new} tokens a prompt")
    ours = answers.pop(OURS)
    shares = {
        name: sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
        for name, theirs in answers.items()
    }
    for name, share in shares.items():
        if dtype == "fp32" and share < 1:
            raise SystemExit(f"{what}: only {share:.1%} of the tokens equal those of {name}")
    return shares


def _take_turns(
    entered: dict[str, Contender], given: list[list[int]], new: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of every contender for 1 and for `new` tokens, a figure a round.

    They alternate within a round, and who begins changes with every round, so that what drifts
    (clock, temperature, other load) meets all alike.
    """
    names = list(entered)
    first: dict[str, list[float]] = {name: [] for name in names}
    whole: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for seconds, count in ((first, 1), (whole, new)):
            for name in names[start:] + names[:start]:
                gc.collect()
                begin = time.perf_counter()
                entered[name].generate(given, count)
                seconds[name].append(time.perf_counter() - begin)
    return first, whole
