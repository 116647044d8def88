"""NeuronCores through transformers-neuronx, for hosts on SDK 2.21 to 2.25: decoder-only families.

The library brings its own networks, caches and graphs; the engine's requests are mapped to what it
offers. A block of the engine's cache is a whole row of the library's, so a block's number is a
row's. Llama and Mistral take rows that come and go; the other families run one row at a time.
Nothing of it has run on a NeuronCore: see docs/neuron.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lmi_multi.backends.ahead_of_time import Compilation, Count
from lmi_multi.backends.base import Limits
from lmi_multi.backends.drawing import draw
from lmi_multi.backends.limits import plan_limits
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.engine.batch import Batch, Passage, Prompt, Row, StepResult
from lmi_multi.errors import BackendError, CapacityError, LmiError, OptionError
from lmi_multi.fit import Network

from . import environment
from .buckets import ladder
from .cache import Cache
from .loading import open_cache
from .transformers_neuronx_export import exported
from .transformers_neuronx_graphs import compile_ahead, key_of, to_cores
from .transformers_neuronx_ports import LIBRARY, Port, find_port

AMP = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
LEAST_BUCKET = 128  # the library's own
DEFAULT_ROWS = 4


def open_executor(
    artifact: Artifact,
    degree: int,
    *,
    memory: int,
    max_batch: int | None,
    max_tokens: int | None,
) -> TransformersNeuronxExecutor:
    """Load the artifact with the library, over `degree` cores that have `memory` bytes each for
    their cache. Raises BackendError for a network that the library does not run or cannot load,
    CheckpointError if its checkpoint cannot be written, and whatever `plan_limits` raises."""
    port = find_port(artifact)
    limits = plan_rows(artifact, port, degree, memory, max_batch, max_tokens)
    environment.take_cores(degree)
    folder = exported(artifact, port)
    cache = _cache(artifact, degree, limits) if port.reads_prompts else None
    try:
        make = opener(artifact, port, limits, degree, folder)
        model = to_cores(make, cache, key_of(port, limits, degree, artifact.dtype))
    except LmiError:
        raise
    except Exception as error:  # the library's, the compiler's or the Neuron runtime's
        raise BackendError(f"{LIBRARY} cannot load {folder}: {error!r}") from error
    rows = ManyRows(model, limits.max_batch) if port.continuous else OneRow(model)
    return TransformersNeuronxExecutor(limits, rows, f"{degree} NeuronCores by {LIBRARY}")


def compile_ahead_of_time(
    artifact: Artifact,
    degree: int,
    *,
    memory: int,
    max_batch: int | None,
    max_tokens: int | None,
    where: str | Path | None,
    jobs: int | None,
) -> Compilation:
    """See `AheadOfTime.compile`: the library loads the weights on the host, builds its graphs and
    compiles them, `jobs` at once. Raises what `open_executor` raises, and BackendError for a family
    whose class compiles on cores only."""
    port = find_port(artifact)
    if not port.reads_prompts:
        raise BackendError(
            f"{LIBRARY} compiles {artifact.spec.family} only when it loads it; "
            f"{environment.CACHE_URL} says where the SDK keeps what it compiled"
        )
    limits = plan_rows(artifact, port, degree, memory, max_batch, max_tokens)
    cache, folder = _cache(artifact, degree, limits, where), exported(artifact, port)
    try:
        make = opener(artifact, port, limits, degree, folder, jobs)
        total, hit = compile_ahead(make, cache, key_of(port, limits, degree, artifact.dtype))
    except LmiError:
        raise
    except Exception as error:  # the library's or the compiler's
        raise BackendError(f"{LIBRARY} cannot compile {folder}: {error!r}") from error
    return Compilation(Count(total, total, total if hit else 0), str(cache))


def _cache(
    artifact: Artifact, degree: int, limits: Limits, where: str | Path | None = None
) -> Cache:
    return open_cache(Network.of(artifact, str(artifact.folder)), degree, limits, where)


def opener(
    artifact: Artifact,
    port: Port,
    limits: Limits,
    degree: int,
    folder: Path,
    jobs: int | None = None,
) -> Callable[[], Any]:
    """What opens the library's model, before anything of it is loaded or compiled."""
    import transformers_neuronx as library  # after the environment: it starts the Neuron runtime

    given = settings(library, port, limits, jobs)
    given |= {"tp_degree": degree, "amp": AMP[artifact.dtype]}
    return partial(getattr(library, port.name).from_pretrained, str(folder), **given)


def plan_rows(
    artifact: Artifact,
    port: Port,
    degree: int,
    memory: int,
    max_batch: int | None,
    max_tokens: int | None,
) -> Limits:
    """Limits under which a block is a row. Raises OptionError for several rows of a family that
    the library runs one at a time, and CapacityError for more rows than `memory` holds."""
    if not port.continuous and max_batch is not None and max_batch > 1:
        raise OptionError(
            f"max_batch is {max_batch}, but {LIBRARY} runs {artifact.spec.family} one row at a "
            "time; allowed: 1"
        )
    limits = plan_limits(
        artifact.spec,
        item_bytes=4 if artifact.dtype == "fp32" else 2,
        ranks=degree,
        memory=memory,
        max_batch=max_batch,
        max_tokens=max_tokens,
        default_batch=DEFAULT_ROWS if port.continuous else 1,
    )
    fitting = limits.blocks * limits.block_size // limits.max_tokens
    if max_batch is not None and fitting < max_batch:
        raise CapacityError(
            f"max_batch is {max_batch}, but the cores' memory holds {fitting} rows of "
            f"{limits.max_tokens} tokens; lower max_batch or max_tokens"
        )
    rows = min(limits.max_batch, fitting)
    return replace(
        limits,
        max_batch=rows,
        max_step_tokens=rows * limits.max_tokens,  # the library reads a prompt whole
        blocks=rows,
        block_size=limits.max_tokens,
        beams=False,
    )


def settings(library: Any, port: Port, limits: Limits, jobs: int | None = None) -> dict[str, Any]:
    """What the class is told: sizes, buckets, continuous batching where it has that, and how many
    graphs to compile at once."""
    buckets = ladder(min(LEAST_BUCKET, limits.max_tokens), limits.max_tokens)
    given: dict[str, Any] = {"batch_size": limits.max_batch, "n_positions": limits.max_tokens}
    neuron: dict[str, Any] = {} if jobs is None else {"compilation_worker_count": jobs}
    if port.reads_prompts:
        given["context_length_estimate"] = buckets
    if port.continuous:
        rows = library.ContinuousBatchingConfig(batch_size_for_shared_caches=limits.max_batch)
        neuron["continuous_batching"] = rows
        given["n_positions"] = buckets
    return given | ({"neuron_config": library.NeuronConfig(**neuron)} if neuron else {})


class Rows(Protocol):
    """What the library's model computes: logits float32 [vocab] of a row's last token."""

    def prompt(self, row: int, token_ids: Sequence[int]) -> Tensor:
        """Begin row number `row` with these tokens."""

    def tokens(self, given: Mapping[int, tuple[int, int]]) -> dict[int, Tensor]:
        """Continue rows: from a row's number to one token and its place in the row."""


class ManyRows:
    """`Rows` that come and go."""

    def __init__(self, model: Any, count: int) -> None:
        self._model, self._count = model, count
        self._first = [0] * count

    def prompt(self, row: int, token_ids: Sequence[int]) -> Tensor:
        """See `Rows.prompt`."""
        self._first[row] = token_ids[0]
        places = torch.arange(len(token_ids))[None]
        logits: Tensor = self._model(torch.tensor([token_ids]), places, torch.tensor([row]))
        return logits[0]

    def tokens(self, given: Mapping[int, tuple[int, int]]) -> dict[int, Tensor]:
        """See `Rows.tokens`. The library would fill rows that are not named with token 0 at place
        0, over what they hold. So all are named: others with the token that is there."""
        for row, (token, place) in given.items():
            if place == 0:
                self._first[row] = token
        every = [given.get(row, (self._first[row], 0)) for row in range(self._count)]
        ids, places = torch.tensor(every)[:, :, None].unbind(1)
        logits: Tensor = self._model(ids, places, torch.arange(self._count))
        return {row: logits[row] for row in given}


class OneRow:
    """`Rows` of a family that runs one at a time; a row's number is always 0."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def prompt(self, row: int, token_ids: Sequence[int]) -> Tensor:
        """See `Rows.prompt`."""
        return self._run(token_ids, 0)

    def tokens(self, given: Mapping[int, tuple[int, int]]) -> dict[int, Tensor]:
        """See `Rows.tokens`."""
        return {row: self._run([token], place) for row, (token, place) in given.items()}

    def _run(self, token_ids: Sequence[int], start: int) -> Tensor:
        places = torch.arange(start, start + len(token_ids), dtype=torch.int32)
        logits: Tensor = self._model(torch.tensor([token_ids]), places)
        return logits[0]


class TransformersNeuronxExecutor:
    """An `Executor` over the library's model."""

    def __init__(self, limits: Limits, rows: Rows, device: str) -> None:
        self.limits, self.device = limits, device
        self._rows = rows

    @torch.inference_mode()
    def step(self, batch: Batch) -> StepResult:
        """See `Executor.step`."""
        single = [row for row in batch.rows if len(row.token_ids) == 1]
        given = {row.blocks[0]: (row.token_ids[0], row.start) for row in single}
        found = self._rows.tokens(given) if given else {}
        for row in batch.rows:
            if len(row.token_ids) > 1:
                found[row.blocks[0]] = self._whole(row)
        drawing = [row for row in batch.rows if row.sample is not None]
        if not drawing:
            return StepResult()
        return StepResult(draw(torch.stack([found[row.blocks[0]] for row in drawing]), drawing))

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """See `Executor.logits`. The library tells those of a last token only, so tokens go one
        by one."""
        found = [
            self._rows.tokens({row.blocks[0]: (token, place)})[row.blocks[0]]
            for row in batch.rows
            for place, token in enumerate(row.token_ids, row.start)
        ]
        return torch.stack(found)

    def encode(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor | None]:
        """Raises BackendError: hidden states stay inside the library's graphs."""
        raise BackendError(f"encode and embed need hidden states, which {LIBRARY} does not return")

    def score(self, passages: Sequence[Passage]) -> Tensor:
        """Raises BackendError: only the last token's logits leave the library's graphs."""
        raise BackendError(
            f"score and prompt_logprobs need the logits of a whole text, of which {LIBRARY} "
            "returns the last token's"
        )

    def close(self) -> None:
        """See `Executor.close`. The cores stay this process's until it ends."""
        self.__dict__.pop("_rows", None)

    def _whole(self, row: Row) -> Tensor:
        """The logits after a row's several tokens, which the library reads at once only where
        they begin the row."""
        if row.start == 0:
            return self._rows.prompt(row.blocks[0], row.token_ids)
        for place, token in enumerate(row.token_ids, row.start):
            last = self._rows.tokens({row.blocks[0]: (token, place)})[row.blocks[0]]
        return last
