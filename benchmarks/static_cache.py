"""transformers' own `generate` with a static cache, as a peer of decode steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.peers import Answer, Peer, Task
from benchmarks.shapes import DTYPES, SHAPES


def _check(task: Task) -> None:
    """It has all shapes: they are made of it."""


@torch.inference_mode()
def _answers(task: Task) -> Iterator[tuple[int, Answer]]:
    """On a GPU such a cache makes it compile the step and capture it as a graph."""
    model: Any = SHAPES[task.shape].build(DTYPES[task.dtype], str(task.device))
    given = 1 if task.spec.kind == "encoder-decoder" else task.prompt  # before the first new token
    for rows in task.batches:
        torch.compiler.reset()  # else what it compiles next is for any number of rows
        ids = torch.tensor(task.prompts(rows), device=task.device)

        @torch.inference_mode()
        def answer(count: int, ids: torch.Tensor = ids) -> list[list[int]]:
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=count,
                cache_implementation="static",
            )
            tokens: list[list[int]] = output[:, given:].tolist()
            return tokens

        yield rows, answer


STATIC = Peer("transformers, static", _check, _answers)
