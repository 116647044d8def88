"""What rounded weights and activations cost, as perplexity: `python -m benchmarks.perplexity`.

Two models: the demo model on sentences that it was not trained on, and a random T5 with outliers
(`outliers.py`) on answers that its float32 self has drawn, whose perplexity is that of its choices.
Each is scored token by token in every format on one device, beside float32 on the same device.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer

import lmi_multi
from benchmarks import outliers, page
from lmi_multi.demo.spoken import HELD_OUT_SEED, pairs
from lmi_multi.prompts import Prompts

FORMATS = (
    ("fp32", None),
    ("fp32", "int8"),
    ("fp32", "fp8"),
    ("bf16", None),
    ("bf16", "int8"),
    ("bf16", "fp8"),
    ("fp16", None),
    ("fp16", "int8"),
    ("fp16", "fp8"),
)
GAP = 5
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Text:
    """Prompts and what is scored after each."""

    source: str | Path
    prompts: Prompts
    answers: Prompts


@dataclass(frozen=True)
class Entry:
    """One model in one format. `relative` is the perplexity over float32's, less 1; `drift` the
    mean size of a token's difference in log-probability. None: some score is not finite."""

    model: str
    dtype: str
    quantize: str | None
    tokens: int
    perplexity: float | None
    relative: float | None
    drift: float | None


@app.command()
def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    count: Annotated[int, typer.Option(help="sentences of the demo model", min=1)] = 200,
    drawn: Annotated[int, typer.Option(help="answers of the random model", min=1)] = 32,
    results: Annotated[Path, typer.Option(help="folder to write to")] = Path("benchmarks/results"),
) -> None:
    """Measure, print a line for each format, and write DEVICE-perplexity.json and .md."""
    entries: list[Entry] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        peak, random = with_outliers(Path(work), drawn)
        for texts in ({"demo": demo(count), "demo, gaps": demo(count, GAP)}, {"outliers": random}):
            for entry in compare(texts, device):
                typer.echo(_row(entry))
                entries.append(entry)
    entries.sort(key=lambda entry: entry.model)  # stable: formats stay in their order
    command = page.command("benchmarks.perplexity")
    figures = {
        "seconds": round(time.perf_counter() - start, 1),
        "largest_ffn_activation": peak,
        "entries": [asdict(entry) for entry in entries],
    }
    text = _page(command, peak, entries)
    page.write(results, f"{device}-perplexity", command, device, figures, text)


def demo(count: int, gap: int = 0) -> Text:
    """Sentences that the demo model has not seen; with `gap`, prompts lack each `gap`th word."""
    known = pairs(HELD_OUT_SEED, count)
    words = [spoken.split() for spoken, _ in known]
    prompts = [" ".join(w for i, w in enumerate(own, 1) if not gap or i % gap) for own in words]
    return Text("demo", prompts, [written for _, written in known])


def with_outliers(folder: Path, count: int, length: int = 48) -> tuple[float, Text]:
    """The random model's largest FFN activation; and prompts with answers that it drew on the CPU,
    so that every device scores the same."""
    peak = outliers.save(folder / "outliers")
    ids = outliers.prompts(count, length)
    with lmi_multi.load(folder / "outliers", backend="cpu", dtype="fp32", max_batch=16) as model:
        found = model.generate(
            ids, do_sample=True, seed=0, top_k=0, max_new_tokens=length, min_new_tokens=length
        )
    # The decoder starts with token 0, which is not scored.
    return peak, Text(folder / "outliers", ids, [list(answer.token_ids) for answer in found])


def compare(
    texts: Mapping[str, Text], device: str, formats: Sequence[tuple[str, str | None]] = FORMATS
) -> Iterator[Entry]:
    """An entry for each format and each of `texts`, which one model is scored on, by their names;
    float32 first: the others are compared with it."""
    [source] = {text.source for text in texts.values()}
    exact: dict[str, npt.NDArray[np.float64]] = {}
    for dtype, quantize in formats:
        # Scoring needs no rows, and captured steps are made for each number of them.
        with lmi_multi.load(
            source, backend=device, dtype=dtype, quantize=quantize, max_batch=1
        ) as model:
            for name, text in texts.items():
                found = np.concatenate(model.score(text.prompts, text.answers)).astype(np.float64)
                yield _entry(name, dtype, quantize, found, exact.setdefault(name, found))


def _entry(
    name: str,
    dtype: str,
    quantize: str | None,
    scores: npt.NDArray[np.float64],
    exact: npt.NDArray[np.float64],
) -> Entry:
    if not np.isfinite(scores).all():
        return Entry(name, dtype, quantize, len(scores), None, None, None)
    return Entry(
        name,
        dtype,
        quantize,
        len(scores),
        math.exp(-scores.mean()),
        math.expm1(exact.mean() - scores.mean()),
        float(np.abs(scores - exact).mean()),
    )


def _row(entry: Entry) -> str:
    form = f"{entry.dtype} {entry.quantize}" if entry.quantize else entry.dtype
    if entry.perplexity is None or entry.relative is None or entry.drift is None:
        figures = "not finite | |"
    else:
        figures = (
            f"{entry.perplexity:.5f} | {round(entry.relative, 5) + 0.0:+.3%} | {entry.drift:.2e}"
        )
    return f"| {entry.model} | {form} | {figures} |"


def _page(command: str, peak: float, entries: Sequence[Entry]) -> str:
    tokens = {entry.model: entry.tokens for entry in entries}
    return f"""# Perplexity of every format

`{command}`
on {{where}}.

`demo`: the demo model on held-out sentences, {tokens["demo"]} tokens. `demo, gaps`: the same,
but every {GAP}th word of the prompts is left out, so that it has to guess. `outliers`: a random T5
whose largest FFN activation is {peak:.3g}, on {tokens["outliers"]} tokens that it drew in float32.
Each beside fp32 on the same device: the perplexity's relative change, and how far a token's
log-probability moves on average. fp16 ends at 65504, below those activations.

| model | format | perplexity | beside fp32 | drift |
| --- | --- | --- | --- | --- |
{chr(10).join(map(_row, entries))}
"""


if __name__ == "__main__":
    app()
