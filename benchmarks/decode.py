"""Decode speed beside Hugging Face transformers: `python -m benchmarks.decode`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer

from benchmarks.contenders import OURS, PEERS
from benchmarks.measure import measure
from benchmarks.result import Case, Result, Settings, ratios
from benchmarks.shapes import DTYPES, SHAPES
from benchmarks.table import markdown

RESULTS = Path(__file__).parent / "results"
DEFAULT_SHAPES = ["t5-small", "gpt2"]
DEFAULT_DTYPES = ["fp32", "bf16"]
DEFAULT_BATCHES = [1, 8]
DEFAULT_PEERS = list(PEERS)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    shape: Annotated[list[str], typer.Option(help=f"of {', '.join(SHAPES)}")] = DEFAULT_SHAPES,
    dtype: Annotated[list[str], typer.Option(help=f"of {', '.join(DTYPES)}")] = DEFAULT_DTYPES,
    batch: Annotated[list[int], typer.Option(help="rows at once", min=1)] = DEFAULT_BATCHES,
    peer: Annotated[list[str], typer.Option(help=f"of {', '.join(PEERS)}")] = DEFAULT_PEERS,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    rounds: Annotated[int, typer.Option(help="the median of so many", min=1)] = 9,
    threads: Annotated[int, typer.Option(help="for all contenders; 0: torch's choice")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    name: Annotated[str, typer.Option(help="of the result's files; DEVICE-decode if empty")] = "",
    work: Annotated[Path | None, typer.Option(help="keeps checkpoints for the next run")] = None,
    results: Annotated[Path, typer.Option(help="folder of the result's files")] = RESULTS,
    require: Annotated[float, typer.Option(help="fail if a step's ratio is below this")] = 0.0,
    compare_only: Annotated[bool, typer.Option(help="show the last result, run nothing")] = False,
) -> None:
    """Time forced greedy decoding of random models, contenders taking turns.

    Options with several values are given once a value: --batch 1 --batch 8.
    """
    path = results / f"{name or f'{device}-decode'}.json"
    if compare_only:
        result = Result.model_validate_json(path.read_text(encoding="utf-8"))
    else:
        _check("--shape", shape, SHAPES)
        _check("--dtype", dtype, DTYPES)
        _check("--peer", peer, PEERS)
        _check("--device", [device], {"cpu": 0, "cuda": 0})
        if threads:
            torch.set_num_threads(threads)
        settings = Settings(
            device=device,
            threads=torch.get_num_threads(),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
        )
        result = measure(settings, shape, dtype, batch, peer, work)
        results.mkdir(parents=True, exist_ok=True)
        path.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    page = markdown(result)
    path.with_suffix(".md").write_text(page, encoding="utf-8")
    typer.echo(page)
    slow = [case for case in result.cases if _ratio(result, case) < require]
    if slow:
        names = ", ".join(f"{c.shape} {c.dtype} batch {c.batch}" for c in slow)
        raise SystemExit(f"below {require} times a peer: {names}")


def _check(option: str, given: list[str], known: Mapping[str, object]) -> None:
    for value in given:
        if value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}", param_hint=option)


def _ratio(result: Result, case: Case) -> float:
    """How many times as fast as the fastest peer a step is."""
    peers = result.contenders[1:]
    return min(median(ratios(case.steps(OURS), case.steps(peer))) for peer in peers)


if __name__ == "__main__":
    app()
