"""What a decode step is compared with: the task, and how every peer's answers are timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

import torch

from benchmarks.hollow import outline
from benchmarks.shapes import SHAPES, prompts
from lmi_multi.checkpoint.layout import DtypeName
from lmi_multi.models.spec import ModelSpec
from lmi_multi.timing import Timing

# Exactly so many greedy tokens for every prompt of a batch, on the host when it returns.
Answer = Callable[[int], Sequence[Sequence[object]]]


@dataclass(frozen=True)
class Task:
    """Prompts of `prompt` tokens, as many as each of `batches` says, answered with `tokens`.
    `work`: the folder for models' files; None is the system's for temporary ones."""

    shape: str
    dtype: DtypeName
    batches: Sequence[int]
    prompt: int
    tokens: int
    rounds: int
    device: torch.device
    work: Path | None = None

    @cached_property
    def spec(self) -> ModelSpec:
        """The network of the shape."""
        return outline(SHAPES[self.shape])[0]

    def prompts(self, rows: int) -> list[list[int]]:
        """The same for every peer."""
        return prompts(self.spec.vocab, rows, self.prompt)


@dataclass(frozen=True)
class Peer:
    """`check` exits with a line if the peer cannot do a task, before any time is spent on it.
    `answers` makes the model and yields, for each number of rows, what answers its prompts; the
    model goes when that is exhausted."""

    label: str
    check: Callable[[Task], None]
    answers: Callable[[Task], Iterator[tuple[int, Answer]]]

    def timings(self, task: Task) -> Iterator[Timing]:
        """One for each number of rows. Raises SystemExit if an answer has another length."""
        for rows, answer in self.answers(task):
            for count in (task.tokens, task.tokens, 1):  # whatever is made on first use
                _milliseconds(answer, rows, count)
            first, whole = (
                median(_milliseconds(answer, rows, count) for _ in range(task.rounds))
                for count in (1, task.tokens)
            )
            yield Timing(rows, first, whole, (whole - first) / (task.tokens - 1))


def _milliseconds(answer: Answer, rows: int, count: int) -> float:
    start = time.perf_counter()
    tokens = answer(count)
    elapsed = (time.perf_counter() - start) * 1000
    found = [len(own) for own in tokens]
    if found != [count] * rows:
        raise SystemExit(f"{rows} answers of {count} tokens wanted, their lengths are {found}")
    return elapsed
