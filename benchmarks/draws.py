"""Draws of a captured step on a GPU, by themselves: `python -m benchmarks.draws`.

Microseconds of one draw for every row, by the kernel that has all options and by torch's operations
as a graph of their own has them: medians of replays of graphs of eight draws, taking turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import typer

from benchmarks import page
from benchmarks.kernels import measure
from benchmarks.options import RESULTS, Results
from benchmarks.prefill import needs_kernels
from lmi_multi.backends.base import Limits
from lmi_multi.ops.sampling import SampleRow

OPTIONS: Mapping[str, SampleRow] = {
    "temperature": SampleRow(temperature=0.8),
    "top-k 50": SampleRow(temperature=1.0, top_k=50),
    "top-p 0.9": SampleRow(temperature=1.0, top_p=0.9),
    "top-k 50, top-p 0.9": SampleRow(temperature=0.8, top_k=50, top_p=0.9),
    "min-p 0.05": SampleRow(temperature=1.0, min_p=0.05),
    "typical 0.9": SampleRow(temperature=1.0, typical_p=0.9),
    "all, 8 bans": SampleRow(
        temperature=0.8, top_k=50, top_p=0.9, min_p=0.02, typical_p=0.95, banned=tuple(range(8))
    ),
}
LAUNCHES = 8
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Case:
    """One kind of rows; microseconds a draw of all of them."""

    options: str
    vocab: int
    rows: int
    ours: float
    torch: float


def case(name: str, vocab: int, count: int) -> Case:
    """Logits like a model's: a few likely tokens, in bfloat16 as the head leaves them."""
    from lmi_multi.backends.cuda.draws import DrawInputs
    from lmi_multi.backends.cuda.fused_draws import FusedDraws
    from lmi_multi.backends.cuda.inputs import StepInputs

    device = torch.device("cuda")
    rows = [OPTIONS[name]._replace(seed=i) for i in range(count)]
    logits = (torch.randn(count, vocab, device=device) * 3).bfloat16()
    fused = FusedDraws(StepInputs(Limits(count, 16, 1, count, 16), count, False, device))
    plain = DrawInputs(count, device)
    for inputs in (fused, plain):
        inputs.fill(rows)
    kind = plain.kind(rows)

    def ours() -> None:
        if not fused.draw(logits):
            raise SystemExit(f"the kernel does not cover {count} rows of {vocab}")

    ours_us, torch_us = measure(
        [ours] * LAUNCHES, [lambda: plain.sample(logits.float(), kind)] * LAUNCHES
    )
    return Case(name, vocab, count, ours_us, torch_us)


@app.command()
def main(
    vocab: Annotated[list[int], typer.Option(min=1)] = [32128, 151936],  # noqa: B006
    rows: Annotated[list[int], typer.Option(min=1)] = [1, 16, 64, 256],  # noqa: B006
    results: Results = RESULTS,
) -> None:
    """Measure, print a line for each case, and write cuda-draws.json and .md."""
    typer.echo(needs_kernels())
    cases = []
    with torch.inference_mode():
        for size in vocab:
            for count in rows:
                for name in OPTIONS:
                    cases.append(case(name, size, count))
                    typer.echo(_row(cases[-1]))
    command = page.command("benchmarks.draws")
    page.write(
        results, "cuda-draws", command, "cuda", {"cases": list(map(asdict, cases))},
        _page(command, cases),
    )  # fmt: skip


def _row(case: Case) -> str:
    cells = [case.options, f"{case.rows} x {case.vocab}", f"{case.ours:.1f}", f"{case.torch:.1f}"]
    return f"| {' | '.join(cells)} | {case.torch / case.ours:.1f} |"


def _page(command: str, cases: Sequence[Case]) -> str:
    return f"""# Draws by options

`{command}`
on {{where}}.

Microseconds to draw a token for every row from bfloat16 logits, options and random numbers on the
GPU, without penalties, biases and log-probabilities: by the kernel (`csrc/draw.cu`), and by torch's
operations, in graphs of {LAUNCHES} draws.

| options | rows x vocabulary | kernel | torch | beside |
| --- | --: | --: | --: | --: |
{chr(10).join(map(_row, cases))}
"""


if __name__ == "__main__":
    app()
