"""How ranks share a network: slices of tensors, stages of layers, or both."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from lmi_multi.models.stages import Stage
from lmi_multi.parallel.collectives import Peers, SingleRank, TorchCollectives
from lmi_multi.parallel.pipeline import OneStage, Pipeline, TorchPipeline


@dataclass(frozen=True)
class Grid:
    """`pipeline` stages, each shared by `tensor` ranks. Ranks are numbered stage by stage."""

    tensor: int
    pipeline: int = 1

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.tensor * self.pipeline

    @property
    def answering(self) -> int:
        """The rank whose results count: the first of those that draw."""
        return self.size - self.tensor

    def slice_of(self, rank: int) -> int:
        """Which slice of its stage's tensors `rank` holds."""
        return rank % self.tensor

    def stage_of(self, rank: int) -> int:
        """Which stage `rank` belongs to."""
        return rank // self.tensor

    def rows(self) -> list[list[int]]:
        """The ranks that share a stage, for every stage."""
        return [list(range(i, i + self.tensor)) for i in range(0, self.size, self.tensor)]

    def columns(self) -> list[list[int]]:
        """The ranks that hold the same slice of every stage, for every slice."""
        return [list(range(i, self.size, self.tensor)) for i in range(self.tensor)]


def connect(grid: Grid, rank: int, stage: Stage) -> Peers:
    """What `rank`, which holds `stage`, says to the others, over torch.distributed's default group.

    Every rank calls this at the same time: groups of ranks are made together.
    """
    pipeline: Pipeline = OneStage()
    if grid.pipeline > 1:
        columns = grid.columns()
        groups = [None] if grid.tensor == 1 else [dist.new_group(ranks) for ranks in columns]
        own = grid.slice_of(rank)
        pipeline = TorchPipeline(stage, columns[own], groups[own])
    if grid.tensor == 1:
        return SingleRank(pipeline)
    if grid.pipeline == 1:
        return TorchCollectives(pipeline=pipeline)
    rows = [dist.new_group(ranks) for ranks in grid.rows()]
    return TorchCollectives(rows[grid.stage_of(rank)], pipeline)
