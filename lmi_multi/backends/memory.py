"""How a GPU's memory is divided: weights, workspace with graphs, and the cache takes the rest.

The workspace is estimated from shapes, before anything is loaded: what torch's own operations hold
at once in the largest step, which is never less than what the kernels hold. Estimates can be
replaced one by one as the operations they stand for are.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmi_multi.errors import OptionError
from lmi_multi.models.schema import Split
from lmi_multi.models.spec import Learned, ModelSpec, Rope
from lmi_multi.models.stages import Stage

MEMORY_SHARE = 0.9
DEFAULT_BATCH = 64
# Of a step beside rows that run, and of one that no row waits for, if memory is left for it.
STEP_TOKENS, IDLE_TOKENS = 2048, 8192
_MIB = 2**20
# Kernels' scratch, cuBLAS's workspaces on two streams, and what the allocator rounds up.
_FIXED = 256 * _MIB
# Another process for each GPU, after free memory was asked for: its context, and NCCL's buffers.
_RANK = 1024 * _MIB
# What is drawn from, for each logit: float32 twice, integer weights, their order and their sum.
_DRAW_BYTES = 32
# The driver's own of a captured kernel, kernels a layer, and graphs that are made while serving.
_NODE_BYTES, _NODES, _GRAPHS = 16 * 1024, 16, 80
# Rows of all steps whose layers are one kernel: of 1, 2, 4, 8 and 16, for two kinds of step.
# Nothing that one of their layers computes makes room for the next one's.
_PROGRAM_ROWS = 2 * (1 + 2 + 4 + 8 + 16)


@dataclass(frozen=True)
class Device:
    """A device's memory in bytes: all of it, and what nobody holds yet."""

    name: str
    total: int
    free: int

    def budget(self, share: float) -> int:
        """Bytes that a model may take in all: `share` of the total, but no more than is free."""
        return min(int(self.total * share), self.free)


@dataclass(frozen=True)
class Need:
    """What a rank holds: bytes of weights, bytes of workspace if it is a GPU, and how many decoder
    layers it caches keys and values of."""

    weights: int
    workspace: int
    layers: int

    def left(self, budget: int) -> int:
        """Bytes for the cache, of `budget` in all; below 0: so many are missing."""
        return budget - self.weights - self.workspace

    def room(self, budget: int) -> float:
        """How many tokens find room, up to a factor that all ranks have in common: the rank with
        the least bounds the cache of all."""
        return self.left(budget) / max(1, self.layers)


def check_share(share: float | None) -> None:
    """Raise OptionError unless `share` is None or a number above 0 and at most 1."""
    number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if share is not None and not (number and 0 < share <= 1):
        raise OptionError(
            f"memory_share is {share!r:.80}, must be None or a number above 0 and at most 1"
        )


def workspace_bytes(
    spec: ModelSpec,
    *,
    widest: int,
    item_bytes: int,
    ranks: int,
    max_batch: int,
    max_tokens: int,
    step_tokens: int,
    stage: Stage | None = None,
) -> int:
    """Bytes that each of `ranks` needs beside weights and cache, at `item_bytes` an activation.

    `widest`: elements on a rank of the largest quantized weight, which torch widens before a
    product of many rows; 0: none is quantized. `max_tokens` are those of the longest sequence,
    `step_tokens` those of the largest step.
    `stage`: the part of a pipeline that `ranks` share, of which the last draws; None: the whole.
    """
    layers = spec.decoder_layers if stage is None else len(stage.decoder)
    heads, kv_heads = (Split(0, (n,)).size(ranks) for n in (spec.heads, spec.kv_heads))
    rows = max(step_tokens, max_tokens)
    residual = 4 * spec.hidden * 4  # before and after the norm, the sum and its addend, as float32
    qkv = 2 * (heads + 2 * kv_heads) * spec.head_dim * item_bytes
    up = 2 * (2 if spec.gated else 1) * -(-spec.ffn // ranks) * item_bytes
    # In parallel blocks the FFN waits, half done, while attention runs.
    held = max(qkv + up // 2, up) if spec.block == "parallel" else max(qkv, up)
    step = rows * (residual + held)
    # By hand, in the pool of graphs that draw, and in that of those that end with logits or search.
    drawn = 3 * max_batch * spec.vocab * _DRAW_BYTES
    graphs = _GRAPHS * _NODES * layers * _NODE_BYTES
    programs = _PROGRAM_ROWS * layers * (residual + qkv + up)
    total = (
        _FIXED
        + step
        + _bias(spec, heads, max_tokens, step_tokens, item_bytes)
        + widest * item_bytes
    )
    if spec.decoder_layers:
        total += graphs + (drawn if stage is None or stage.last else 0)
    whole = stage is None or stage.count == 1  # a stage has no captured steps
    return total + (programs if whole else 0) + (0 if whole and ranks == 1 else _RANK)


def _bias(spec: ModelSpec, heads: int, tokens: int, step_tokens: int, item_bytes: int) -> int:
    """What torch's attention adds to a prompt's scores [heads, queries, keys]: in float32 and then
    in the activations' type; for a window alone of one head. A decoder's prompt comes in slices."""
    queries = tokens if spec.encoder_layers else min(tokens, step_tokens)
    if isinstance(spec.position, (Learned, Rope)):
        heads = 1 if any(spec.windows) else 0
    return heads * queries * tokens * (4 + item_bytes)
