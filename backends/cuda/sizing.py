"""Whether a model fits the GPUs of a machine, how large its cache is, and what would fit if not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import get_args

from lmi_multi.backends.base import Limits
from lmi_multi.backends.limits import block_bytes, plan_limits
from lmi_multi.backends.memory import (
    DEFAULT_BATCH,
    IDLE_TOKENS,
    MEMORY_SHARE,
    STEP_TOKENS,
    Device,
    Need,
)
from lmi_multi.checkpoint.files import gib
from lmi_multi.checkpoint.layout import DTYPES, DtypeName, QuantizeName
from lmi_multi.errors import CapacityError
from lmi_multi.fit import report
from lmi_multi.instances import INSTANCES
from lmi_multi.models.schema import valid_degrees
from lmi_multi.models.spec import ModelSpec
from lmi_multi.models.stages import most_stages
from lmi_multi.network import Network
from lmi_multi.parallel.grid import Grid

_AMPLE = 2**60  # bytes of a cache that leaves every limit as it was asked for


@dataclass(frozen=True)
class Sizes:
    """What a model was planned with: the limits of all ranks, what each rank needs, and the bytes
    of a cache block in one layer."""

    limits: Limits
    ranks: Mapping[int, Need]
    layer_block: int

    def cache(self, rank: int, limits: Limits) -> int:
        """Bytes of a rank's cache with `limits`, which may be less than those planned."""
        return limits.blocks * self.ranks[rank].layers * self.layer_block

    def compared(self, rank: int, limits: Limits, taken: int) -> str:
        """`taken` bytes of a GPU, measured after loading, beside the plan, as a line for people."""
        need, cache = self.ranks[rank], self.cache(rank, limits)
        beside = taken - need.weights - cache
        return (
            f"weights {gib(need.weights)}, cache {gib(cache)}, and beside them {gib(beside)} "
            f"after loading, of the {gib(need.workspace)} that were left for steps and graphs"
        )


def sizes_on(
    network: Network,
    gpus: Mapping[int, Device],
    grid: Grid,
    max_batch: int | None,
    max_tokens: int | None,
    memory_share: float | None,
    spare: Callable[[], Mapping[int, Device]] = dict,
) -> Sizes:
    """The sizes of `network` over the ranks of `grid`; None as in `Backend.load`.

    `gpus` by the ranks that they are for: the first `grid.size` are taken, or, where other
    processes have the other ranks, this one's. The fullest decides. `spare` finds this machine's
    others, by the ranks that they could be for; it is asked where the model does not fit.

    Raises CapacityError that says how many GiB are missing and what would fit, OptionError for
    `max_batch`, `max_tokens` or stages that cannot be.
    """
    asked = _Asked(max_batch, max_tokens, memory_share or MEMORY_SHARE)
    found = _plan(network, gpus, grid, asked)
    if isinstance(found, Sizes):
        return found
    split = ", ".join(f"{name}={value}" for name, value in _split(grid).items())
    advice = _advice(network, {**gpus, **spare()}, grid, asked)
    raise CapacityError(f"{network.source} does not fit at {split}: {found}; {advice}")


@dataclass(frozen=True)
class _Asked:
    max_batch: int | None
    max_tokens: int | None
    share: float


def _split(grid: Grid) -> dict[str, int]:
    """The settings that ask for `grid`."""
    stages = {"pipeline_parallel": grid.pipeline} if grid.pipeline > 1 else {}
    return {"tensor_parallel": grid.tensor, **stages}


def _plan(network: Network, gpus: Mapping[int, Device], grid: Grid, asked: _Asked) -> Sizes | str:
    """The sizes, or why there are none. Steps that no row waits for are large if the cache loses
    nothing by them; not of ranks, which all end where one step does not fit."""
    ample = _limits(network, grid, network.spec.decoder_layers, _AMPLE, asked)
    if grid.size == 1:
        found = _planned(network, gpus, grid, asked, ample, IDLE_TOKENS)
        if isinstance(found, Sizes) and found.limits.blocks == ample.blocks:
            return found
    return _planned(network, gpus, grid, asked, ample, STEP_TOKENS)


def _planned(
    network: Network,
    gpus: Mapping[int, Device],
    grid: Grid,
    asked: _Asked,
    ample: Limits,
    step_tokens: int,
) -> Sizes | str:
    """`ample`: the limits that were asked for, whatever fits; `step_tokens`: of any step."""
    needs = network.needs(
        network.dtype,
        network.quantize,
        grid.tensor,
        grid.pipeline,
        ample.max_batch,
        ample.max_tokens,
        step_tokens,
    )
    ranks = {rank: needs[grid.stage_of(rank)] for rank in gpus if rank < grid.size}
    least = min(ranks, key=lambda rank: ranks[rank].room(gpus[rank].budget(asked.share)))
    need, gpu = ranks[least], gpus[least]
    left = need.left(gpu.budget(asked.share))
    try:
        if left >= 0:
            limits = _limits(network, grid, need.layers, left, asked)
            item_bytes = DTYPES[network.dtype].itemsize
            block = block_bytes(network.spec, item_bytes, grid.tensor, limits.block_size, layers=1)
            return Sizes(replace(limits, max_idle_tokens=step_tokens), ranks, block)
        fault = f"{gib(-left)} are missing"
    except CapacityError as error:
        fault = str(error)
    stage = f" of stage {grid.stage_of(least)}" if grid.pipeline > 1 else ""
    return (
        f"of each GPU{stage} weights need {gib(need.weights)} and steps {gib(need.workspace)}, and "
        f"{gpu.name} has {gib(gpu.free)} of {gib(gpu.total)} free, of which "
        f"memory_share={asked.share:g} allows {gib(gpu.budget(asked.share))}: {fault}"
    )


def _limits(network: Network, grid: Grid, layers: int, memory: int, asked: _Asked) -> Limits:
    return plan_limits(
        network.spec,
        item_bytes=DTYPES[network.dtype].itemsize,
        ranks=grid.tensor,
        memory=memory,
        layers=layers,
        max_batch=asked.max_batch,
        max_tokens=asked.max_tokens,
        default_batch=DEFAULT_BATCH,
        max_step_tokens=STEP_TOKENS,
    )


def _advice(network: Network, gpus: Mapping[int, Device], grid: Grid, asked: _Asked) -> str:
    """What would fit these GPUs with the fewest changes, or else the smallest instance."""
    ways = [
        way
        for dtype in _narrower(network.dtype)
        for quantize in _smaller(network.quantize)
        if (way := _way(network, dtype, quantize, gpus, grid, asked))
    ]
    fewest = [way for way in ways if not any(other < way for other in ways)]
    if fewest:
        each = (", ".join(f"{n}={v!r}" for n, v in sorted(way)) for way in fewest)
        return f"what would fit: {'; or '.join(each)}"
    instances = [instance for instance in INSTANCES if instance.backend == "cuda"]
    other = report(
        network.convertible(), instances, asked.max_tokens, asked.share, grid.pipeline
    ).smallest
    for o in other:
        if (o.dtype, o.quantize) == (network.dtype, network.quantize):
            split = _split(Grid(o.tensor_parallel, o.pipeline_parallel))
            wanted = {"dtype": o.dtype, "quantize": o.quantize, **split}
            each = (f"{name}={value!r}" for name, value in wanted.items())
            return f"nothing would fit here; {o.instance} takes it with {', '.join(each)}"
    return "nothing would fit here, nor any instance in this format"


def _narrower(dtype: DtypeName) -> tuple[DtypeName, ...]:
    """The type itself, and what may stand in for it."""
    return ("fp32", "bf16") if dtype == "fp32" else (dtype,)


def _smaller(quantize: QuantizeName | None) -> tuple[QuantizeName | None, ...]:
    return (None, *get_args(QuantizeName)) if quantize is None else (quantize,)


def _way(
    network: Network,
    dtype: DtypeName,
    quantize: QuantizeName | None,
    gpus: Mapping[int, Device],
    grid: Grid,
    asked: _Asked,
) -> frozenset[tuple[str, object]] | None:
    """The settings to change for this format, with the first of `_larger` that fits."""
    other = replace(network, dtype=dtype, quantize=quantize)
    for more in _larger(network.spec, grid, len(gpus)):
        if isinstance(_plan(other, gpus, more, asked), Sizes):
            return frozenset(
                _settings(dtype, quantize, more).items()
                - _settings(network.dtype, network.quantize, grid).items()
            )
    return None


def _settings(dtype: DtypeName, quantize: QuantizeName | None, grid: Grid) -> dict[str, object]:
    return {
        "dtype": dtype,
        "quantize": quantize,
        "tensor_parallel": grid.tensor,
        "pipeline_parallel": grid.pipeline,
    }


def _larger(spec: ModelSpec, grid: Grid, count: int) -> list[Grid]:
    """`grid`, and those of at most `count` ranks that share the network among more: the fewest
    stages first, as more of them make no step faster."""
    stages = range(grid.pipeline, min(count, most_stages(spec)) + 1)
    every = [
        Grid(degree, of) for of in stages for degree in valid_degrees(spec, count // of)
        if degree >= grid.tensor
    ]  # fmt: skip
    return [grid, *(other for other in every if other != grid)]
