"""The compiled kernels: whether they are here, and if not, why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from mmap import ACCESS_READ, mmap
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
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if capability is not None and capability < LEAST_CAPABILITY:
        return "for compute capability 8.0 and later"
    try:
        torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"not loadable ({str(error.__cause__ or error).splitlines()[0]})"
    archs = built_for()
    if capability is not None and archs and not has_code(archs, capability):
        own = "".join(map(str, capability))
        return f"built for sm_{', '.join(archs)}, not for this GPU's sm_{own} (make kernels)"
    return ""


def built_for() -> list[str]:
    """The architectures of the library, such as 80 and 90a, as csrc/archs.cu has them."""
    with LIBRARY.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as text:
        found = re.search(rb"lmi_multi is compiled for ([0-9af ]+)\0", text)
        return found[1].decode().split() if found else []


def has_code(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether what is compiled for `archs` runs on a GPU of this compute capability.

    Machine code does on those of its generation that are no older, and that of 90a on its own kind
    alone; the last one's PTX on all that are no older.
    """
    own = capability[0] * 10 + capability[1]
    for arch in archs:
        number = int(arch.rstrip("af"))
        if number == own or (arch.isdigit() and own // 10 * 10 <= number <= own):
            return True
    return archs[-1].isdigit() and int(archs[-1]) <= own
