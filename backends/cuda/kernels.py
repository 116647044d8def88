"""The compiled kernels: whether they are here, and if not, why."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from lmi_multi.switches import is_off

LIBRARY = Path(__file__).with_name("_kernels.so")
SWITCH = "LMI_MULTI_CUDA_KERNELS"
LEAST_CAPABILITY = (8, 0)


@cache
def missing() -> str:
    """Load the kernels; what keeps them from being used, or an empty string."""
    if not LIBRARY.exists():
        return "not built (make kernels)"
    if is_off(SWITCH):
        return f"switched off ({SWITCH}=0)"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return "for compute capability 8.0 and later"
    try:
        torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"not loadable ({str(error.__cause__ or error).splitlines()[0]})"
    return ""
