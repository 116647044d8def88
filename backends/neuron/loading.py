"""From an artifact to its graphs, and with its weights to an executor."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from lmi_multi.backends.base import Limits
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.models.weights import rank_data

from .buckets import Buckets
from .cache import Cache
from .executor import NeuronExecutor, spare_blocks
from .graphs import Graphs
from .lower import TraceCollectives
from .module import StaticModel, buffer_name
from .program import Runtime


def open_graphs(
    artifact: Artifact,
    degree: int,
    limits: Limits,
    runtime: Runtime,
    cache: Cache | None = None,
    must_keep: bool = False,
) -> Graphs:
    """The graphs of the artifact over `degree` cores; no weights are read, none is made yet."""
    blocks = limits.blocks + spare_blocks(artifact.spec, limits)
    tensors = _placeholders(artifact, degree)
    collectives = TraceCollectives(degree)
    module = StaticModel(artifact.spec, tensors, collectives, blocks, limits.block_size)
    builder = runtime.builder(module, module.state_names, degree)
    traces = Buckets.of(artifact.spec, limits, blocks).traces()
    return Graphs(builder, runtime.toolchain, traces, cache, must_keep)


def open_executor(
    artifact: Artifact,
    degree: int,
    limits: Limits,
    runtime: Runtime,
    cache: Cache | None = None,
) -> NeuronExecutor:
    """The artifact over `degree` cores of `runtime`, with graphs from `cache` if it has them."""
    spec = artifact.spec
    graphs = open_graphs(artifact, degree, limits, runtime, cache)
    if not runtime.lazy:
        graphs.make_all(os.cpu_count() or 1)
    program = graphs.assemble()
    shards = (
        artifact.load_rank(rank, degree) | rank_data(spec, rank, degree) for rank in range(degree)
    )
    program.load_weights([{buffer_name(n): t for n, t in shard.items()} for shard in shards])
    buckets = Buckets.of(spec, limits, limits.blocks + spare_blocks(spec, limits))
    return NeuronExecutor(spec, limits, program, buckets, f"{degree} {runtime.device}")


def _placeholders(artifact: Artifact, degree: int) -> dict[str, Tensor]:
    """Rank 0's tensors without their values: weights are inputs of a graph."""
    stored = {t.name: torch.zeros(t.local_shape(degree), dtype=t.dtype) for t in artifact.stored}
    return stored | rank_data(artifact.spec, 0, degree)
