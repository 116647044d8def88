"""Weights from the page cache to a GPU, beside the rate of a plain copy: `python -m
benchmarks.loading [--gib 10 --shape gpt-j-6b]`.

A file of tensors by our reader and by safetensors' own; and `load` of an artifact of a shape, whose
weights are a hole in a file, until the model is ready: weights, cache, steps tried.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file

import lmi_multi
from benchmarks import page
from benchmarks.hollow import hollow_artifact
from benchmarks.options import RESULTS, Results, Shapes
from benchmarks.random_model import check
from lmi_multi.checkpoint.header import read_header

ROUNDS, CHUNK = 5, 2**24

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Rate:
    """Bytes, and the seconds that they took: a first time, and the median of rounds behind it."""

    what: str
    size: int
    first: float
    seconds: float

    @property
    def gigabytes(self) -> float:
        """A second."""
        return self.size / self.seconds / 1e9


@app.command()
def main(
    gib: Annotated[int, typer.Option(help="size of the file", min=1)] = 10,
    shape: Shapes = ["gpt-j-6b"],  # noqa: B006
    results: Results = RESULTS,
) -> None:
    """Measure, print a line for each, and write cuda-loading.json and .md."""
    check("cuda", shape, "bf16", "", results)
    copy = _copy()
    rates = [copy, *_file(gib), *(_ready(name) for name in shape)]
    for rate in rates:
        typer.echo(_row(rate, copy))
    command = page.command("benchmarks.loading")
    figures = {"rates": [asdict(rate) | {"gigabytes": rate.gigabytes} for rate in rates]}
    page.write(results, "cuda-loading", command, "cuda", figures, _page(command, rates))


def _copy() -> Rate:
    host = torch.zeros(2**30, dtype=torch.uint8, pin_memory=True)
    target = torch.zeros_like(host, device="cuda")
    return _rate("copy of pinned memory", 2**30, lambda: target.copy_(host, non_blocking=True))


def _file(gib: int) -> list[Rate]:
    """Tensors of a GiB each, by both readers."""
    from lmi_multi.backends.cuda.loading import read_file

    device = torch.device("cuda", 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({str(i): torch.zeros(2**29, dtype=torch.bfloat16) for i in range(gib)}, path)
        size, infos = path.stat().st_size, read_header(path)
        return [
            _rate(f"file of {gib} GiB", size, lambda: read_file(path, infos, device)),
            _rate("the same, by safetensors", size, lambda: load_file(path, device="cuda:0")),
        ]


def _ready(name: str) -> Rate:
    """From `load` to a model that answers; closed again, which does not count."""
    with tempfile.TemporaryDirectory() as folder:
        artifact = hollow_artifact(name, "bf16", None, Path(folder))
        path = artifact.rank_path(0)
        size = path.stat().st_size
        _read(path, size)  # into the page cache
        seconds = []
        for _ in range(ROUNDS + 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model = lmi_multi.load(folder, backend="cuda")
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            model.close()
            del model
            gc.collect()
    return Rate(f"{name} ready", size, seconds[0], median(seconds[1:]))


def _read(path: Path, size: int) -> None:
    with path.open("rb") as file, ThreadPoolExecutor() as pool:
        for _ in pool.map(partial(os.pread, file.fileno(), CHUNK), range(0, size, CHUNK)):
            pass


def _rate(what: str, size: int, work: Callable[[], object]) -> Rate:
    seconds = []
    for _ in range(ROUNDS + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return Rate(what, size, seconds[0], median(seconds[1:]))


def _row(rate: Rate, copy: Rate) -> str:
    share = rate.gigabytes / copy.gigabytes
    figures = f"{rate.first:.3f} | {rate.seconds:.3f} | {rate.gigabytes:.1f} | {share:.0%}"
    return f"| {rate.what} | {figures} |"


def _page(command: str, rates: list[Rate]) -> str:
    return f"""# Weights to a GPU

`{command}`
on {{where}}.

Files are in the page cache; those of models are holes, whose pages are zero. Seconds of a first
round, and the median of {ROUNDS} behind it; GB a second, and the share of the copy's. A model is
ready when `load` returns: with its weights, its cache, and steps of one row and of all rows tried.

| what | first, s | s | GB/s | share |
| --- | --: | --: | --: | --: |
{chr(10).join(_row(rate, rates[0]) for rate in rates)}
"""


if __name__ == "__main__":
    app()
