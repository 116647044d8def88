"""Variables that must be set before the Neuron runtime starts in a process."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence

from lmi_multi.errors import BackendError

# As ModelBuilder's own: overflowing casts saturate, nothing is cast behind the model's back.
COMPILER_FLAGS = "--enable-saturate-infinity --auto-cast=none --model-type=transformer -O1"
TARGETS = {"inf2": "inf2", "trn1": "trn1", "trn2": "trn2"}


def variables(
    cores: Sequence[int], cache_url: str | None = None, generation: str | None = None
) -> dict[str, str]:
    """What to set for a process on neighbouring `cores`. `cache_url` is a folder or s3:// place
    for compiled graphs; `generation` is set to compile for other hardware than is here."""
    found = {
        "NEURON_RT_VISIBLE_CORES": _spans(cores),
        "NEURON_RT_NUM_CORES": str(len(cores)),
        "NEURON_CC_FLAGS": COMPILER_FLAGS,
    }
    if cache_url:
        found["NEURON_COMPILE_CACHE_URL"] = cache_url
    if generation:
        found["NEURON_PLATFORM_TARGET_OVERRIDE"] = TARGETS[generation]
    return found


def _spans(cores: Sequence[int]) -> str:
    first, last = cores[0], cores[-1]
    if list(cores) != list(range(first, last + 1)):
        return ",".join(map(str, cores))
    return str(first) if first == last else f"{first}-{last}"


def apply(wanted: Mapping[str, str], environment: MutableMapping[str, str]) -> None:
    """Set `wanted`. What the user has set stays, unless it names other cores: that raises
    BackendError, as the runtime would start where nobody asked for it."""
    cores = ("NEURON_RT_VISIBLE_CORES", "NEURON_RT_NUM_CORES")
    for name in cores:
        have = environment.get(name)
        if have is not None and have != wanted[name]:
            raise BackendError(
                f"{name} is {have!r}, but this model runs on {wanted[name]!r}; unset it or set that"
            )
    for name, value in wanted.items():
        environment.setdefault(name, value)
