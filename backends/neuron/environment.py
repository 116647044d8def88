"""Variables that must be set before the Neuron runtime starts in a process."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence

from lmi_multi.checkpoint.files import cache_dir
from lmi_multi.checkpoint.s3.address import Address
from lmi_multi.errors import BackendError

from . import devices
from .places import parse

# As ModelBuilder's own: overflowing casts saturate, nothing is cast behind the model's back.
COMPILER_FLAGS = "--enable-saturate-infinity --auto-cast=none --model-type=transformer -O1"
FLAGS = "NEURON_CC_FLAGS"
CORES = "NEURON_RT_VISIBLE_CORES"
COUNT = "NEURON_RT_NUM_CORES"
INSTANCE = "LMI_MULTI_NEURON_INSTANCE"
CACHE = "LMI_MULTI_NEURON_CACHE"
CACHE_URL = "NEURON_COMPILE_CACHE_URL"
SDK_CACHE = "neuronx-cc"
# "PID CORES": the process that has set NEURON_RT_VISIBLE_CORES, and to what. Its children inherit
# both, and see by this one that no user has named these cores.
TAKEN = "LMI_MULTI_NEURON_TAKEN"
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
    return {CORES: spans(cores), COUNT: str(len(cores))}


def spans(cores: Sequence[int]) -> str:
    """Ascending numbers as NEURON_RT_VISIBLE_CORES takes them: a range, or a list."""
    first, last = cores[0], cores[-1]
    if list(cores) != list(range(first, last + 1)):
        return ",".join(map(str, cores))
    return str(first) if first == last else f"{first}-{last}"


def parse_cores(value: str) -> list[int]:
    """The numbers in a value of NEURON_RT_VISIBLE_CORES, as "0-3,8", each once. Raises
    BackendError."""
    found: list[int] = []
    for part in value.split(","):
        first, _, last = part.strip().partition("-")
        last = last or first
        if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
            raise BackendError(f"{CORES} is {value!r}, must be numbers and ranges, as '0-3,8'")
        found += range(int(first), int(last) + 1)
    return list(dict.fromkeys(found))


def _taker() -> int | None:
    """The process of this package that has named the cores; None if the user has, or nobody."""
    pid, _, cores = os.environ.get(TAKEN, "").partition(" ")
    return int(pid) if pid.isdigit() and cores == os.environ.get(CORES) else None


def _asked() -> str | None:
    """NEURON_RT_VISIBLE_CORES as far as it is meant for this process: not if a parent process has
    taken these cores for itself."""
    return os.environ.get(CORES) if _taker() in (None, os.getpid()) else None


def named_cores(host: devices.Host) -> list[int] | None:
    """The cores that NEURON_RT_VISIBLE_CORES names for this process; None if it names none. Raises
    BackendError for cores that `host` does not have, where its cores are known."""
    asked = _asked()
    if asked is None:
        return None
    named, known = parse_cores(asked), [core.index for core in host.cores]
    if known and not set(named) <= set(known):
        raise BackendError(f"{CORES} is {asked!r}, but this host's NeuronCores are {spans(known)}")
    return named


def fault(host: devices.Host) -> tuple[str, str] | None:
    """Why a process with these variables cannot use a core of `host`, and what helps; None if it
    can. Who holds named cores is not known, only who holds their devices: they need but exist."""
    if _asked() is None:
        return devices.fault(host)
    if found := devices.fault(host, 0):
        return found
    try:
        named_cores(host)
    except BackendError as error:
        return str(error), "name cores that exist, or unset it"
    return None


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
    set_compiler()
    host = devices.look()
    named = named_cores(host)
    if named is None:
        if found := devices.fault(host, count):
            raise BackendError("; ".join(found))
        if CORES in os.environ:  # a parent's
            for name in (CORES, COUNT):
                os.environ.pop(name, None)
        chosen = variables(devices.choose(host, count))
        apply(chosen, os.environ)
        os.environ[TAKEN] = f"{os.getpid()} {chosen[CORES]}"
    elif len(named) < count:
        raise BackendError(_too_few(count, host))


def _too_few(count: int, host: devices.Host) -> str:
    asked = os.environ[CORES]
    if _taker() is not None:
        return (
            f"tensor_parallel is {count}, but this process has taken the NeuronCores {asked} for "
            "an earlier model, and the Neuron runtime takes cores once a process; load a model of "
            f"another degree in a process of its own, or set {CORES} to enough cores before the "
            "first"
        )
    known = [core.index for core in host.cores]
    of = f" of {spans(known)}" if known else ""
    return f"{CORES} is {asked!r}, but tensor_parallel is {count}; name {count}{of}, or unset it"


def compile_for(instance: str) -> None:
    """Let the compiler's tools believe that this machine is of type `instance`."""
    set_compiler()
    name = target(instance)
    if name is not None:
        apply({"NEURON_PLATFORM_TARGET_OVERRIDE": name}, os.environ)


def set_compiler() -> None:
    """Tell what the SDK compiles by itself its flags, and where to keep it, unless the user has."""
    os.environ.setdefault(FLAGS, COMPILER_FLAGS)
    os.environ.setdefault(CACHE_URL, cache_url())


def cache_url() -> str:
    """Where the SDK's own cache lies: inside what LMI_MULTI_NEURON_CACHE names, a folder or
    `s3://BUCKET/PREFIX`, or else in this package's cache. Not in an artifact's folder, as the
    variable is read once a process, and models come and go."""
    place = parse(os.environ.get(CACHE) or cache_dir())
    if isinstance(place, Address):
        return place.url(SDK_CACHE)
    return str(place.expanduser().absolute() / SDK_CACHE)
