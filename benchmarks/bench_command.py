"""Our decode steps as `lmi-multi bench` has them, in a process of its own: an artifact of a true
size and random weights, loaded as any other."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.hollow import hollow_artifact
from benchmarks.peers import Task
from benchmarks.random_model import random_model
from benchmarks.shapes import SHAPES
from lmi_multi.checkpoint.header import read_header
from lmi_multi.checkpoint.layout import QuantizeName
from lmi_multi.timing import Timing


def bench_timings(task: Task, quantize: QuantizeName | None) -> Iterator[Timing]:
    """One for each number of rows. Raises SystemExit if the command fails, or if there is no
    room for the artifact."""
    with tempfile.TemporaryDirectory(dir=task.work) as folder:
        try:
            _write(task, quantize, Path(folder))
        except OSError as error:
            raise SystemExit(
                f"{task.shape} cannot be written to {folder}: {error.strerror}"
            ) from None
        torch.cuda.empty_cache()  # all of the GPU is the command's
        arguments = [
            *("--backend", task.device.type, "--json"),
            *("--prompt-tokens", str(task.prompt), "--new-tokens", str(task.tokens)),
            *("--rounds", str(task.rounds)),
            *(word for rows in task.batches for word in ("--batch", str(rows))),
        ]
        command = [sys.executable, "-m", "lmi_multi", "bench", folder, *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"`lmi-multi bench` of {task.shape} ended with {done.returncode}")
    for said in done.stdout.splitlines():
        found = json.loads(said)
        yield Timing(**{name: found[name] for name in ("rows", "first", "whole", "step")})


def _write(task: Task, quantize: QuantizeName | None, folder: Path) -> Path:
    """The file of weights of an artifact in `folder`: random, made on the device."""
    path = hollow_artifact(task.shape, task.dtype, quantize, folder).rank_path(0)
    infos = read_header(path)
    _, tensors = random_model(SHAPES[task.shape], task.dtype, quantize, task.device)
    with path.open("r+b") as file:
        for name, tensor in tensors.items():
            file.seek(infos[name].start)
            file.write(tensor.cpu().view(-1).view(torch.uint8).numpy().data)
    return path
