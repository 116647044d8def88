"""How long rows that run wait while newcomers prefill: `python -m benchmarks.newcomers`.

Rows of a model over random weights decode; then prompts come, all at once. Steps are driven as a
server drives them, and the time between two tokens of a row is taken on the host. A decoder's
prompts share the steps with the rows that run, in slices: a step has at most `--step-tokens` tokens
in all. An encoder takes a prompt whole, so there the longest prompt is the slice.

The bound beside them is a step without newcomers and one full slice by itself: what a row should
wait at most, but for what later slices read of the earlier ones.
"""

from __future__ import annotations

import gc
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer

from benchmarks import page
from benchmarks.generate import milliseconds
from benchmarks.options import RESULTS, Dtype, Quantize, Results, Shapes
from benchmarks.prefill import own_run
from benchmarks.random_model import check, open_model
from lmi_multi.backends.memory import STEP_TOKENS
from lmi_multi.checkpoint.layout import DtypeName, QuantizeName
from lmi_multi.engine.engine import Engine
from lmi_multi.engine.sequence import Sequence as Answer
from lmi_multi.model import Model
from lmi_multi.models.spec import ModelSpec

STEADY = 32  # steps without newcomers that are timed
SETTLE = 4  # steps before them, and behind the last newcomer's first token

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Load:
    """`rows` that run, of `prompt` tokens each, and `newcomers` of `long` tokens."""

    rows: int
    prompt: int
    newcomers: int
    long: int

    def longest(self, step_tokens: int) -> int:
        """Tokens of the longest row."""
        return max(self.prompt + self.tokens(step_tokens), self.long + 2 * SETTLE)

    def tokens(self, step_tokens: int) -> int:
        """That the running rows draw."""
        return SETTLE + STEADY + self.steps(step_tokens)

    def steps(self, step_tokens: int) -> int:
        """More than the newcomers' prefill can take."""
        each = max(1, step_tokens - self.rows - self.newcomers)
        return self.newcomers * (-(-self.long // each) + 1) + 2 * SETTLE

    def slice(self, spec: ModelSpec, step_tokens: int) -> list[int]:
        """Tokens of the prompts in a step that is full of newcomers."""
        if spec.kind != "decoder":
            fitting = max(1, step_tokens // self.long)
            return [self.long] * min(self.newcomers, fitting)
        left = min(step_tokens - self.rows, self.newcomers * self.long)
        return [self.long] * (left // self.long) + ([left % self.long] if left % self.long else [])


@dataclass(frozen=True)
class Case:
    """One shape at one size of steps. Milliseconds between two tokens of a row that runs, over all
    rounds: `alone` and `beside` newcomers, median and worst; `slice`, a full slice's prefill by
    itself; `first`, from newcomers' coming to the last one's first token, median; `steps` between.
    """

    shape: str
    dtype: str
    step_tokens: int
    alone: float
    alone_worst: float
    beside: float
    beside_worst: float
    slice: float
    first: float
    steps: int

    @property
    def bound(self) -> float:
        """What a row should wait at most."""
        return self.alone + self.slice


@app.command()
def main(
    shape: Shapes = ["gpt-j-6b"],  # noqa: B006
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Dtype = "bf16",
    quantize: Quantize = "",
    rows: Annotated[int, typer.Option(help="rows that run", min=1)] = 16,
    prompt_tokens: Annotated[int, typer.Option(help="of these rows", min=1)] = 128,
    newcomers: Annotated[int, typer.Option(min=1)] = 4,
    # With the tokens that follow them GPT-J's positions are full.
    long: Annotated[int, typer.Option(help="a newcomer's tokens", min=1)] = 2032,
    step_tokens: Annotated[list[int], typer.Option(help="a step's tokens")] = [512, STEP_TOKENS],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    results: Results = RESULTS,
) -> None:
    """Measure, print a line for each case, and write DEVICE-newcomers.json and .md."""
    if narrow := [n for n in step_tokens if n <= rows + newcomers]:
        raise SystemExit(f"--step-tokens is {narrow[0]}; allowed: above rows and newcomers")
    load = Load(rows, prompt_tokens, newcomers, long)
    longest = max(load.longest(most) for most in step_tokens)
    form = check(device, shape, dtype, quantize, results, longest)
    cases = []
    for name in shape:
        for most in step_tokens:
            case = measure(name, *form, torch.device(device), load, most, rounds)
            typer.echo(_row(case))
            cases.append(case)
    command = page.command("benchmarks.newcomers")
    figures = {
        "load": asdict(load),
        "rounds": rounds,
        "cases": [asdict(case) | {"bound": case.bound} for case in cases],
    }
    text = _page(command, load, cases, rounds)
    page.write(results, f"{device}-newcomers", command, device, figures, text)


def measure(
    name: str, dtype: DtypeName, quantize: QuantizeName | None, device: torch.device, load: Load,
    step_tokens: int, rounds: int,
) -> Case:  # fmt: skip
    """One case; a first round, in which steps are captured, does not count."""
    tokens, longest = load.tokens(step_tokens), load.longest(step_tokens)
    with tempfile.TemporaryDirectory() as work:
        model = open_model(
            *(name, dtype, quantize, device, Path(work)),
            *(load.rows + load.newcomers, longest, step_tokens),
        )
        with model:
            measured = [_round(model, load, tokens) for _ in range(rounds + 1)][1:]
            slice_ms = _slice(model, load.slice(model.artifact.spec, step_tokens), rounds)  # type: ignore[arg-type]
        del model
        gc.collect()
    alone = [gap for own in measured for gap in own.alone]
    beside = [gap for own in measured for gap in own.beside]
    return Case(
        shape=name,
        dtype=quantize or dtype,
        step_tokens=step_tokens,
        alone=median(alone),
        alone_worst=max(alone),
        beside=median(beside),
        beside_worst=max(beside),
        slice=slice_ms,
        first=median(own.first for own in measured),
        steps=max(own.steps for own in measured),
    )


@dataclass(frozen=True)
class _Round:
    alone: list[float]
    beside: list[float]
    first: float
    steps: int


def _round(model: Model, load: Load, tokens: int) -> _Round:
    engine = model.engine
    running = _answers(model, load.rows, load.prompt, tokens)
    coming = _answers(model, load.newcomers, load.long, SETTLE)
    try:
        engine.submit(running)
        while any(len(answer.generated) < SETTLE for answer in running):
            engine.step()
        gaps = _gaps(engine, running)
        alone = [gap for _ in range(STEADY) for gap in next(gaps)]
        engine.submit(coming)
        start, beside, steps = time.perf_counter(), list[float](), 0
        while not all(answer.generated for answer in coming):
            beside += next(gaps)
            steps += 1
        first = (time.perf_counter() - start) * 1000
        if any(answer.finish_reason for answer in running):
            raise SystemExit("rows ended before the newcomers' prefill did")
        # The step behind the last prefill may have been begun late.
        beside += next(gaps)
        return _Round(alone, beside, first, steps)
    finally:
        engine.drop([*running, *coming])


def _gaps(engine: Engine, running: Sequence[Answer]) -> Iterator[list[float]]:
    """Run a step at a time: milliseconds since its last token of each row that got one."""
    last = dict.fromkeys(running, time.perf_counter())
    known = {answer: len(answer.generated) for answer in running}
    while True:
        engine.step()
        now, found = time.perf_counter(), []
        for answer in running:
            if len(answer.generated) > known[answer]:
                found.append((now - last[answer]) * 1000)
                known[answer], last[answer] = len(answer.generated), now
        yield found


def _answers(model: Model, count: int, length: int, tokens: int) -> list[Answer]:
    chance = random.Random(length)
    vocab = model.spec.vocab
    prompts = [[chance.randrange(2, vocab) for _ in range(length)] for _ in range(count)]
    _, _, jobs = model._jobs(prompts, None, {"max_new_tokens": tokens})
    return [answer for job in jobs for answer in job.answers]


@torch.inference_mode()
def _slice(model: Model, counts: Sequence[int], rounds: int) -> float:
    """Milliseconds of a prefill of prompts of so many tokens."""
    ids = [[5] * count for count in counts]
    run = own_run(model.engine.executor, model.artifact.spec, ids)  # type: ignore[arg-type]
    milliseconds(run)
    return median(milliseconds(run) for _ in range(rounds))


def _row(case: Case) -> str:
    figures = (
        *(case.alone, case.alone_worst, case.beside, case.beside_worst),
        *(case.slice, case.bound, case.first),
    )
    shown = " | ".join(f"{ms:.2f}" for ms in figures)
    return f"| {case.shape} | {case.dtype} | {case.step_tokens} | {shown} | {case.steps} |"


def _page(command: str, load: Load, cases: Sequence[Case], rounds: int) -> str:
    return f"""# Rows that run while newcomers prefill

`{command}`
on {{where}}.

Random weights of the true shapes. {load.rows} rows decode, begun by prompts of {load.prompt}
tokens; then {load.newcomers} prompts of {load.long} tokens come at once. Milliseconds between two
tokens of a row that runs, over {rounds} rounds: `alone` and `beside` newcomers, each median and
worst. `slice` is the prefill of a full slice by itself, `bound` that and a step alone. `first` is
the time from the newcomers' coming to the last one's first token, in so many `steps`. A decoder's
step has at most `step tokens`, those of rows that run included; an encoder takes a prompt whole.

| shape | weights | step tokens | alone | worst | beside | worst | slice | bound | first | steps |
| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |
{chr(10).join(map(_row, cases))}
"""


if __name__ == "__main__":
    app()
