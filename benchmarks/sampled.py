"""Decode steps by sampling options on a GPU, over random weights: `python -m benchmarks.sampled`.

Prompts of 128 tokens, as many forced ones; a step is (time of the whole answer - time of its first
token) over the tokens behind the first, medians of rounds, so it holds all that the host does.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer

from benchmarks import page
from benchmarks.options import RESULTS, Dtype, Results, Shapes
from benchmarks.random_model import check, limits_for, random_model
from benchmarks.shapes import SHAPES
from lmi_multi.checkpoint.layout import DtypeName
from lmi_multi.engine.engine import Engine
from lmi_multi.parallel.collectives import SingleRank
from lmi_multi.timing import time_generation

SAMPLED: dict[str, Any] = {"do_sample": True, "seed": 0}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": SAMPLED | {"temperature": 0.8, "top_k": 0},
    "top-k 50, top-p 0.9": SAMPLED | {"top_k": 50, "top_p": 0.9},
    "typical 0.9": SAMPLED | {"top_k": 0, "typical_p": 0.9},
    "repetition penalty": {"repetition_penalty": 1.3},
    "presence, frequency, bias": {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
        "logit_bias": {5: 1.0, 9: -2.0},
    },
    "no 3-gram twice": {"no_repeat_ngram_size": 3},
    "5 log-probabilities": {"logprobs": 5},
    "many at once": SAMPLED
    | {
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.9,
        "typical_p": 0.95,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "no_repeat_ngram_size": 3,
        "logprobs": 5,
    },
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Case:
    """One shape by one kind of options; `step` is milliseconds."""

    shape: str
    dtype: str
    options: str
    rows: int
    step: float


def cases(
    name: str,
    dtype: DtypeName,
    counts: Sequence[int],
    tokens: int,
    rounds: int,
    device: torch.device,
) -> Iterator[Case]:
    """One shape at every number of rows, by every kind of options."""
    from lmi_multi.backends.cuda.executor import CudaExecutor
    from lmi_multi.backends.cuda.ops import Scratch

    spec, tensors = random_model(SHAPES[name], dtype, None, device)
    limits = limits_for(spec, max(counts), 2 * tokens + 16, 8192)
    executor = CudaExecutor(spec, tensors, limits, Scratch(device), SingleRank())
    engine = Engine(executor)
    for count in counts:
        for kind, options in OPTIONS.items():
            timing = time_generation(
                engine, spec, count, tokens, tokens, rounds, options={**options, "ignore_eos": True}
            )
            yield Case(name, dtype, kind, count, timing.step)
    engine.close()
    gc.collect()
    torch.cuda.empty_cache()


@app.command()
def main(
    shape: Shapes = ["flan-t5-base"],  # noqa: B006
    dtype: Dtype = "bf16",
    batch: Annotated[list[int], typer.Option(help="rows at once", min=1)] = [1, 16, 64],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="of every prompt and answer", min=2)] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    results: Results = RESULTS,
) -> None:
    """Measure, print a line for each case, and write cuda-sampled.json and .md."""
    known, _ = check("cuda", shape, dtype, "", results, 2 * tokens)
    found = []
    for name in shape:
        for case in cases(name, known, batch, tokens, rounds, torch.device("cuda", 0)):
            typer.echo(f"{name} {case.options:26} rows {case.rows:3}  step {case.step:.3f} ms")
            found.append(case)
    command = page.command("benchmarks.sampled")
    figures = {"cases": list(map(asdict, found))}
    page.write(results, "cuda-sampled", command, "cuda", figures, _page(command, found, tokens))


def _page(command: str, found: Sequence[Case], tokens: int) -> str:
    steps: dict[tuple[str, int], dict[str, float]] = {}
    for case in found:
        steps.setdefault((case.shape, case.rows), {})[case.options] = case.step
    head = " | ".join(f"{shape}, {rows}" for shape, rows in steps)
    lines = [
        f"| {kind} | {' | '.join(f'{own[kind]:.3f}' for own in steps.values())} |"
        for kind in OPTIONS
    ]
    return f"""# Decode steps by sampling options

`{command}`
on {{where}}.

Random weights of the true shapes, prompts and answers of {tokens} tokens: milliseconds a step, with
all that the host does, by options and rows at once.

| options | {head} |
| --- | {" | ".join(["--:"] * len(steps))} |
{chr(10).join(lines)}
"""


if __name__ == "__main__":
    app()
