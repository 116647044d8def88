"""Tiny models on the real CPU executor, with limits of the test's own, and a look inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import ByT5Tokenizer

from lmi_multi.backends.base import Executor, Limits
from lmi_multi.backends.torch_executor import TorchExecutor
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.convert import convert
from lmi_multi.checkpoint.layout import DtypeName
from lmi_multi.engine.batch import Batch, Passage, Prompt, StepResult
from lmi_multi.model import Model
from lmi_multi.ops.cpu import CpuOps
from lmi_multi.parallel.collectives import SingleRank
from tests.families import FAMILIES

BYTES = 259  # ByT5's vocabulary without extra ids
LIMITS = Limits(max_batch=4, max_tokens=64, max_step_tokens=64, blocks=64, block_size=8)


def checkpoint(folder: Path, family: str, tokenizer: bool = False) -> Path:
    """A family's tiny checkpoint under `folder`, made once; on request with a byte tokenizer."""
    target = folder / (f"{family}-bytes" if tokenizer else f"{family}-ids")
    if not target.exists():
        if tokenizer:
            FAMILIES[family].save(target, vocab=BYTES)
            ByT5Tokenizer(extra_ids=0).save_pretrained(target)
        else:
            FAMILIES[family].save(target)
    return target


def artifact(
    folder: Path, family: str, tokenizer: bool = False, dtype: DtypeName = "fp32"
) -> Artifact:
    """The same as an artifact, converted once for each dtype."""
    source = checkpoint(folder, family, tokenizer)
    target = source.with_name(f"{source.name}-{dtype}-artifact")
    return Artifact.open(target) if target.exists() else convert(source, target, dtype=dtype)


def executor(artifact: Artifact, **limits: Any) -> TorchExecutor:
    """The CPU's executor, with `LIMITS` but for `limits`."""
    tensors = artifact.load_rank(0, 1)
    changed = replace(LIMITS, **limits)
    return TorchExecutor(artifact.spec, tensors, changed, CpuOps(), SingleRank())


def model(artifact: Artifact, opened: Executor | None = None, **limits: Any) -> Model:
    """A model over `opened`, or over a fresh executor."""
    return Model(artifact, "cpu", executor(artifact, **limits) if opened is None else opened)


def free_blocks(model: Model) -> int:
    """How many of the cache's blocks nobody holds."""
    return model._engine.scheduler.cache.free


def is_clean(model: Model) -> bool:
    """Whether nothing runs or waits, and every block is free."""
    return model._engine.scheduler.idle and free_blocks(model) == model.limits.blocks


class Watched:
    """An executor that notes its batches, and calls `before` with each one's number."""

    def __init__(self, inner: Executor, before: Callable[[int], None] = lambda number: None):
        self.inner, self.before = inner, before
        self.batches: list[Batch] = []

    @property
    def limits(self) -> Limits:
        return self.inner.limits

    @property
    def device(self) -> str:
        return self.inner.device

    def step(self, batch: Batch) -> StepResult:
        self.batches.append(batch)
        self.before(len(self.batches))
        return self.inner.step(batch)

    def logits(self, batch: Batch) -> Tensor:
        return self.inner.logits(batch)

    def encode(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor | None]:
        return self.inner.encode(prompts)

    def score(self, passages: Sequence[Passage]) -> Tensor:
        return self.inner.score(passages)

    def close(self) -> None:
        self.inner.close()
