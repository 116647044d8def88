"""Loads a checkpoint with transformers; with accelerate its layers go to all GPUs."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import psutil
import torch

from lmi_multi import backends
from lmi_multi.backends.base import Limits
from lmi_multi.backends.limits import DEFAULT_TOKENS
from lmi_multi.checkpoint.files import gib
from lmi_multi.checkpoint.layout import DTYPES, DtypeName
from lmi_multi.checkpoint.plan import dominant
from lmi_multi.checkpoint.reader import CheckpointReader
from lmi_multi.errors import BackendError, CapacityError, CheckpointError, OptionError
from lmi_multi.fallback.executor import TransformersExecutor
from lmi_multi.fallback.foreign import Foreign, first_line
from lmi_multi.parallel import torchrun

_BLOCK = 16


def load(
    foreign: Foreign, *, backend: str, dtype: str, max_tokens: int | None
) -> TransformersExecutor:
    """An executor for `foreign`; the arguments are those of `lmi_multi.load`.

    Raises CheckpointError where weights are missing or do not fit the config, BackendError for
    other hardware than GPUs and CPUs, and CapacityError.
    """
    limits = _limits(foreign, max_tokens)
    device = _device(backend)
    reader = CheckpointReader(foreign.folder)  # sizes and headers are checked before anything runs
    infos = reader.tensors.values()
    name: DtypeName = dominant(infos) if dtype == "auto" else dtype  # type: ignore[assignment]
    kind = DTYPES[name]
    if device == "cpu":
        _check_memory(sum(math.prod(info.shape) for info in infos) * kind.itemsize)
    try:
        network = _network(foreign, kind, device)
    except torch.OutOfMemoryError as error:
        raise CapacityError(f"{device} has no room for the weights: {first_line(error)}") from None
    return TransformersExecutor(network, limits)


def _limits(foreign: Foreign, max_tokens: int | None) -> Limits:
    """One row, which has room for its longest text: blocks are counted, but hold nothing."""
    longest = foreign.positions
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise OptionError(f"max_tokens is {max_tokens!r}, must be an integer, at least 1")
    if max_tokens is not None and longest and max_tokens > longest:
        raise OptionError(f"max_tokens is {max_tokens}, but the model's positions end at {longest}")
    tokens = max_tokens or min(longest or DEFAULT_TOKENS, DEFAULT_TOKENS)
    return Limits(
        max_batch=1,
        max_tokens=tokens,
        max_step_tokens=tokens + 1,  # a prompt goes through the network whole
        blocks=2 * -(-tokens // _BLOCK),
        block_size=_BLOCK,
    )


def _device(backend: str) -> str:
    """`cpu`, `cuda` for all GPUs, or, under torchrun, the one of this process."""
    if backend not in ("auto", "cuda", "cpu"):
        raise BackendError(
            f"backend is {backend!r:.80}; allowed beside fallback='transformers': auto, cuda, cpu"
        )
    if backend == "cpu" or (backend == "auto" and not backends.probe("cuda").ok):
        return "cpu"
    backends.select("cuda")
    own = torchrun.own_gpu(torch.cuda.device_count())
    return "cuda" if own is None else f"cuda:{own}"


def _check_memory(needed: int) -> None:
    free = psutil.virtual_memory().available
    if needed > free:
        raise CapacityError(f"the weights need {gib(needed)} of memory, but {gib(free)} are free")


def _network(foreign: Foreign, dtype: torch.dtype, device: str) -> Any:
    spread = device == "cuda" and importlib.util.find_spec("accelerate") is not None
    try:
        network, report = foreign.kind.from_pretrained(
            str(foreign.folder),
            config=foreign.config,
            dtype=dtype,
            device_map="auto" if spread else None,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises whatever the files lead to
        raise CheckpointError(
            f"{foreign.folder} cannot be loaded by transformers: {first_line(error)}"
        ) from None
    for problem in ("missing_keys", "mismatched_keys"):  # what it would fill with random numbers
        if found := sorted(map(str, report.get(problem) or ())):
            raise CheckpointError(
                f"{foreign.folder}: weights and config disagree: {len(found)} "
                f"{problem.replace('_', ' ')}, of which the first is {found[0]:.200}"
            )
    return (network if spread else network.to(device)).eval()
