"""Variables that must be set before the Neuron runtime starts in a process."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence

from lmi_multi.errors import BackendError

from . import devices

# As ModelBuilder's own: overflowing casts saturate, nothing is cast behind the model's back.
COMPILER_FLAGS = "--enable-saturate-infinity --auto-cast=none --model-type=transformer -O1"
FLAGS = "NEURON_CC_FLAGS"
CORES = "NEURON_RT_VISIBLE_CORES"
INSTANCE = "LMI_MULTI_NEURON_INSTANCE"
TARGETS = ("inf2", "trn1", "trn2")


def instance_here() -> str | None:
    """The instance type: LMI_MULTI_NEURON_INSTANCE, or what the machine says; None if neither."""
    return os.environ.get(INSTANCE) or devices.instance_type()


def target(instance: str | None) -> str | None:
    """The compiler's name of an instance type's hardware; None for one that it has none for."""
    family = (instance or "").removeprefix("ml.").partition(".")[0].removesuffix("n")
    return family if family in TARGETS else None


def compiler_flags(instance: str | None) -> str:
    """The compiler's flags for an instance type: the user's NEURON_CC_FLAGS, or else ours."""
    flags, name = os.environ.get(FLAGS, COMPILER_FLAGS), target(instance)
    return flags if name is None or "--target" in flags else f"{flags} --target={name}"


def variables(cores: Sequence[int]) -> dict[str, str]:
    """What to set for a process on `cores`."""
    return {CORES: _spans(cores), "NEURON_RT_NUM_CORES": str(len(cores))}


def _spans(cores: Sequence[int]) -> str:
    first, last = cores[0], cores[-1]
    if list(cores) != list(range(first, last + 1)):
        return ",".join(map(str, cores))
    return str(first) if first == last else f"{first}-{last}"


def parse_cores(value: str) -> list[int]:
    """The numbers in a value of NEURON_RT_VISIBLE_CORES, as "0-3,8". Raises BackendError."""
    found: list[int] = []
    for part in value.split(","):
        first, _, last = part.strip().partition("-")
        if not (first.isdigit() and (last or first).isdigit()):
            raise BackendError(f"{CORES} is {value!r}, must be numbers and ranges, as '0-3,8'")
        found += range(int(first), int(last or first) + 1)
    return found


def apply(wanted: Mapping[str, str], environment: MutableMapping[str, str]) -> None:
    """Set `wanted`. Raises BackendError where another value stands: the runtime would start where
    nobody asked for it."""
    for name, value in wanted.items():
        have = environment.setdefault(name, value)
        if have != value:
            raise BackendError(
                f"{name} is {have!r}, but this model runs on {value!r}; unset it or set that"
            )


def take_cores(count: int) -> None:
    """Name the cores of this process: those that NEURON_RT_VISIBLE_CORES names already, or else
    `count` free ones. Raises BackendError, with a remedy, if there are fewer."""
    asked = os.environ.get(CORES)
    if asked is None:
        host = devices.look()
        if fault := devices.fault(host, count):
            raise BackendError("; ".join(fault))
        apply(variables(devices.choose(host, count)), os.environ)
    elif len(parse_cores(asked)) < count:
        raise BackendError(
            f"{CORES} is {asked!r}, but tensor_parallel is {count}; name so many cores, or unset it"
        )


def compile_for(instance: str) -> None:
    """Let the compiler's tools believe that this machine is of type `instance`."""
    name = target(instance)
    if name is not None:
        apply({"NEURON_PLATFORM_TARGET_OVERRIDE": name}, os.environ)
