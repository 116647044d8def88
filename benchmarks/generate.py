"""A whole `Model.generate` beside its parts: `python -m benchmarks.generate --device cuda`.

A model of a true shape over random weights, made where they are used; prompts of 128 random token
ids, 128 forced new ones, greedy. In every round, in one process and by one engine:

- `generate`: the public call, from lists of ids to completions: checks, options, scheduler, steps,
  finished answers. All but the tokenizer: prompts are ids, and completions have no text.
- `first` and `step`, as `benchmarks.steps` has them: an answer of one token, and each one after it.
- `prefill`: the executor's part of `first` alone, all prompts at once, as `benchmarks.prefill`
  has it.

`whole` is generate / (first + 127 steps). `parts` is generate / (prefill + steps), 127 of them, or
128 of an encoder-decoder, whose first token is a step behind the encoder: all that is no step and
no prefill, also that a batch whose prompts exceed `--idle-tokens` comes in several prefills.
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
from benchmarks.options import RESULTS, Dtype, Quantize, Results, Shapes
from benchmarks.prefill import Run, own_run
from benchmarks.random_model import check, open_model
from lmi_multi.backends.memory import IDLE_TOKENS, STEP_TOKENS
from lmi_multi.checkpoint.layout import DtypeName, QuantizeName
from lmi_multi.model import Model
from lmi_multi.timing import time_generation

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Case:
    """One shape at one number of rows: milliseconds, a figure a round in each list. `steps` of an
    answer are beside its prefill."""

    shape: str
    dtype: str
    rows: int
    new_tokens: int
    steps: int
    generate: list[float]
    first: list[float]
    step: list[float]
    prefill: list[float]

    @property
    def whole(self) -> float:
        """generate / (first + step * tokens after it), the median of rounds."""
        pairs = zip(self.generate, self.first, self.step, strict=True)
        return median(own / (first + (self.new_tokens - 1) * step) for own, first, step in pairs)

    @property
    def parts(self) -> float:
        """generate / (prefill + step * steps), the median of rounds."""
        pairs = zip(self.generate, self.prefill, self.step, strict=True)
        return median(own / (prefill + self.steps * step) for own, prefill, step in pairs)


@app.command()
def main(
    shape: Shapes = ["flan-t5-base"],  # noqa: B006
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Dtype = "bf16",
    quantize: Quantize = "",
    batch: Annotated[list[int], typer.Option(help="prompts at once", min=1)] = [1, 4, 16, 64],  # noqa: B006
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    step_tokens: Annotated[
        int, typer.Option(help="of a step beside rows that run; what `load` plans", min=1)
    ] = STEP_TOKENS,
    idle_tokens: Annotated[
        int,
        typer.Option(help="of a step that no row waits for, if more; what it plans", min=0),
    ] = IDLE_TOKENS,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    require: Annotated[float, typer.Option(help="fail if `parts` is above this")] = 0.0,
    results: Results = RESULTS,
) -> None:
    """Measure, print a line for each case, and write DEVICE-generate.json and .md."""
    form = check(device, shape, dtype, quantize, results, prompt_tokens + new_tokens)
    cases = []
    for name in shape:
        for case in measure(
            name, *form, torch.device(device), batch, prompt_tokens, new_tokens,
            step_tokens, idle_tokens, rounds,
        ):  # fmt: skip
            typer.echo(_row(case))
            cases.append(case)
    command = page.command("benchmarks.generate")
    figures = {
        "prompt_tokens": prompt_tokens,
        "step_tokens": step_tokens,
        "idle_tokens": idle_tokens,
        "cases": [asdict(case) | {"whole": case.whole, "parts": case.parts} for case in cases],
    }
    text = _page(command, cases, prompt_tokens, step_tokens, idle_tokens)
    page.write(results, f"{device}-generate", command, device, figures, text)
    if require and (over := [case for case in cases if case.parts > require]):
        raise SystemExit("\n".join([f"`parts` is above {require}:", *map(_row, over)]))


def measure(
    name: str, dtype: DtypeName, quantize: QuantizeName | None, device: torch.device,
    batches: Sequence[int], prompt: int, tokens: int, step_tokens: int, idle_tokens: int,
    rounds: int,
) -> Iterator[Case]:  # fmt: skip
    """A case for each number of rows."""
    with tempfile.TemporaryDirectory() as work:
        model = open_model(
            name, dtype, quantize, device, Path(work), max(batches), prompt + tokens + 16,
            step_tokens, idle_tokens,
        )  # fmt: skip
        with model:
            for rows in batches:
                yield _case(model, name, quantize or dtype, rows, prompt, tokens, rounds)
        del model
        gc.collect()


def _case(
    model: Model, name: str, dtype: str, rows: int, prompt: int, tokens: int, rounds: int
) -> Case:
    chance = random.Random(rows)
    vocab = model.spec.vocab
    prompts = [[chance.randrange(2, vocab) for _ in range(prompt)] for _ in range(rows)]
    engine = model.engine
    prefill = own_run(engine.executor, model.artifact.spec, prompts)  # type: ignore[arg-type]
    encoded = model.spec.kind == "encoder-decoder"
    case = Case(name, dtype, rows, tokens, tokens - (not encoded), [], [], [], [])
    _answer(model, prompts, tokens)  # whatever is made on first use
    for _ in range(rounds):
        case.generate.append(milliseconds(lambda: _answer(model, prompts, tokens)))
        timing = time_generation(engine, model.spec, rows, prompt, tokens, 1)
        case.first.append(timing.first)
        case.step.append(timing.step)
        with torch.inference_mode():
            case.prefill.append(milliseconds(prefill))
    return case


def _answer(model: Model, prompts: list[list[int]], tokens: int) -> None:
    for completion in model.generate(prompts, max_new_tokens=tokens):
        if len(completion.token_ids) != tokens:
            raise SystemExit(f"{len(completion.token_ids)} tokens came for {tokens}: {completion}")


def milliseconds(run: Run) -> float:
    """Of a run, with what the GPU has still to do for it."""
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return (time.perf_counter() - start) * 1000


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _row(case: Case) -> str:
    figures = (median(own) for own in (case.generate, case.first, case.prefill, case.step))
    shown = " | ".join(f"{ms:.3f}" for ms in figures)
    return (
        f"| {case.shape} | {case.dtype} | {case.rows} | {shown} | {case.whole:.3f} "
        f"| {case.parts:.3f} |"
    )


def _page(
    command: str, cases: Sequence[Case], prompt: int, step_tokens: int, idle_tokens: int
) -> str:
    rounds, most = len(cases[0].generate), max(step_tokens, idle_tokens)
    return f"""# A whole `generate` beside its parts

`{command}`
on {{where}}.

Random weights of the true shapes, prompts of {prompt} token ids, {cases[0].new_tokens} forced new
tokens, greedy, at most {step_tokens} tokens a step, {most} where no row waits for it, no tokenizer;
milliseconds, medians of {rounds} rounds.
`generate` is the public call. `first` is an answer of one token, `step` each token after it,
`prefill` the executor's prefill alone, all prompts at once. `whole` = generate / (first + a step
for each further token); `parts` = generate / (prefill + steps). Ratios are taken in each round.

| shape | weights | rows | generate | first | prefill | step | whole | parts |
| --- | --- | --: | --: | --: | --: | --: | --: | --: |
{chr(10).join(map(_row, cases))}
"""


if __name__ == "__main__":
    app()
