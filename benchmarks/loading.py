"""Weights from the page cache to a GPU, beside the rate of a plain copy: `python -m
benchmarks.loading [--gib 10]`."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from lmi_multi.backends.cuda.loading import read_file
from safetensors.torch import load_file, save_file

from lmi_multi.checkpoint.header import read_header

ROUNDS = 5


def main(gib: Annotated[int, typer.Option(help="Size of the file.", min=1)] = 10) -> None:
    """Print bytes a second, medians, of the copy, of the loader and of safetensors' own."""
    device = torch.device("cuda", 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({str(i): torch.zeros(2**29, dtype=torch.bfloat16) for i in range(gib)}, path)
        size = path.stat().st_size
        infos = read_header(path)
        host = torch.zeros(2**30, dtype=torch.uint8, pin_memory=True)
        target = torch.zeros_like(host, device=device)
        copy = _rate(2**30, lambda: target.copy_(host, non_blocking=True))
        typer.echo(f"pinned copy   {copy:6.1f} GB/s")
        ours = _rate(size, lambda: read_file(path, infos, device))
        typer.echo(f"lmi_multi     {ours:6.1f} GB/s  {ours / copy:.0%} of the copy")
        theirs = _rate(size, lambda: load_file(path, device="cuda:0"))
        typer.echo(f"safetensors   {theirs:6.1f} GB/s  {theirs / copy:.0%} of the copy")


def _rate(size: int, work: object) -> float:
    seconds = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()  # type: ignore[operator]
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return size / median(seconds) / 1e9


if __name__ == "__main__":
    typer.run(main)
