"""How many rows and tokens fit: the arithmetic that every backend sizes its cache with."""

from __future__ import annotations

from lmi_multi.backends.base import Limits
from lmi_multi.errors import CapacityError, OptionError
from lmi_multi.models.schema import Split
from lmi_multi.models.spec import ModelSpec

DEFAULT_TOKENS = 2048


def plan_limits(
    spec: ModelSpec,
    *,
    item_bytes: int,
    ranks: int,
    memory: int,
    max_batch: int | None,
    max_tokens: int | None,
    default_batch: int = 16,
    block_size: int = 16,
    max_step_tokens: int = 2048,
    layers: int | None = None,
) -> Limits:
    """Limits for a cache of at most `memory` bytes a rank, `item_bytes` a cached element.

    `ranks` share each layer; `layers` are the decoder layers that a rank has, of a pipeline's
    stages the most; None: all.

    Raises OptionError if `max_tokens` exceeds what the positions allow or a value is below 1,
    and CapacityError if not even one row of `max_tokens` fits.
    """
    check_sizes(max_batch, max_tokens)
    longest = spec.max_positions
    if max_tokens is not None and longest and max_tokens > longest:
        raise OptionError(f"max_tokens is {max_tokens}, but the model's positions end at {longest}")
    tokens = max_tokens or default_tokens(spec)
    batch = max_batch or default_batch
    per_row = row_blocks(spec, tokens, tokens, block_size)
    block = block_bytes(spec, item_bytes, ranks, block_size, layers)
    fitting = memory // block if block else batch * per_row
    if fitting < per_row:
        raise CapacityError(
            f"a row of {tokens} tokens needs {per_row * block / 2**30:.2f} GiB of cache, but only "
            f"{memory / 2**30:.2f} GiB are free; lower max_tokens or raise tensor_parallel or "
            "pipeline_parallel"
        )
    return Limits(
        max_batch=batch,
        max_tokens=tokens,
        max_step_tokens=max_step_tokens,
        blocks=min(batch * per_row, fitting),
        block_size=block_size,
    )


def check_sizes(max_batch: int | None, max_tokens: int | None) -> None:
    """Raise OptionError for a value below 1, whatever the model."""
    for name, value in (("max_batch", max_batch), ("max_tokens", max_tokens)):
        if value is not None and (type(value) is not int or value < 1):
            raise OptionError(f"{name} is {value!r}, must be an integer, at least 1")


def default_tokens(spec: ModelSpec) -> int:
    """`max_tokens` where nobody says."""
    return min(spec.max_positions or DEFAULT_TOKENS, DEFAULT_TOKENS)


def row_blocks(spec: ModelSpec, tokens: int, prompt: int, block_size: int) -> int:
    """Cache blocks of one sequence of `tokens` decoder tokens with `prompt` encoded ones."""
    own = -(-tokens // block_size)
    return own + (-(-prompt // block_size) if spec.kind == "encoder-decoder" else 0)


def block_bytes(
    spec: ModelSpec, item_bytes: int, ranks: int, block_size: int, layers: int | None = None
) -> int:
    """Bytes of one block on one rank: keys and values of its decoder layers; None: of all."""
    kv_heads = Split(0, (spec.kv_heads,)).size(ranks)
    count = spec.decoder_layers if layers is None else layers
    return 2 * count * block_size * kv_heads * spec.head_dim * item_bytes
