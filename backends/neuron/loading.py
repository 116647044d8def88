"""From an artifact to an executor on the emulator."""

from __future__ import annotations

from lmi_multi.backends.base import Limits
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.models.weights import rank_data

from .buckets import Buckets
from .emulator import EmulatorRuntime
from .executor import NeuronExecutor, spare_blocks
from .lower import TraceCollectives
from .module import StaticModel, buffer_name


def open_emulated(artifact: Artifact, degree: int, limits: Limits) -> NeuronExecutor:
    """The artifact over `degree` emulated cores."""
    spec = artifact.spec
    shards = [
        artifact.load_rank(rank, degree) | rank_data(spec, rank, degree) for rank in range(degree)
    ]
    blocks = limits.blocks + spare_blocks(spec, limits)
    module = StaticModel(spec, shards[0], TraceCollectives(degree), blocks, limits.block_size)
    buckets = Buckets.of(spec, limits, blocks)
    traces = list(buckets.traces())
    program = EmulatorRuntime().compile(module, module.state_names, traces, degree)
    program.load_weights([{buffer_name(n): t for n, t in shard.items()} for shard in shards])
    return NeuronExecutor(spec, limits, program, buckets, f"{degree} emulated NeuronCores")
