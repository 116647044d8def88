"""The registry of backends: names to modules, imported only when asked for."""

from __future__ import annotations

from importlib import import_module

from lmi_multi.backends.ahead_of_time import AheadOfTime
from lmi_multi.backends.base import Availability, Backend
from lmi_multi.errors import BackendError, OptionError

# In the order that backend="auto" prefers them. A module holds `BACKEND`.
MODULES = {
    "cuda": "lmi_multi.backends.cuda",
    "neuron": "lmi_multi.backends.neuron",
    "cpu": "lmi_multi.backends.cpu",
}


def get(name: str) -> Backend:
    """The backend called `name`. Raises OptionError for an unknown name."""
    if name not in MODULES:
        raise OptionError(f"backend is {name!r}, must be auto, {', '.join(MODULES)}")
    backend: Backend = import_module(MODULES[name]).BACKEND
    return backend


def compiler() -> AheadOfTime:
    """The backend whose graphs can be compiled ahead of time."""
    found: AheadOfTime = import_module(MODULES["neuron"]).BACKEND
    return found


def probe(name: str) -> Availability:
    """Whether backend `name` can run here; a module that cannot be imported is not available."""
    try:
        return get(name).probe()
    except ImportError as error:
        return Availability(name, False, f"cannot be imported: {error}", "reinstall lmi_multi")


def available() -> list[Availability]:
    """Every known backend, probed on this machine."""
    return [probe(name) for name in MODULES]


def select(name: str) -> Backend:
    """The named backend, or for "auto" the first one that can run here.

    Raises OptionError for an unknown name, and BackendError with the reason and the remedy if the
    named one cannot run here.
    """
    if not isinstance(name, str):
        raise OptionError(f"backend is {name!r:.80}, must be auto, {', '.join(MODULES)}")
    if name == "auto":
        name = next(a.name for a in available() if a.ok)
    backend = get(name)
    state = backend.probe()
    if not state.ok:
        raise BackendError(f"backend {name!r} is not available: {state.reason}; {state.remedy}")
    return backend
