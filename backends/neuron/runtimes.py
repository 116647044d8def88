"""The runtimes by name, which is asked for, and which fits what is installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

from lmi_multi.errors import BackendError, OptionError
from lmi_multi.instances import Instance

from . import sdk
from .program import Runtime

VARIABLE = "LMI_MULTI_NEURON_RUNTIME"


EMULATOR_NEEDS = ("torch_xla", "jax", "jaxlib")


def emulator_fault() -> tuple[str, str] | None:
    """Why the emulator cannot run here, and what helps; None if it can."""
    missing = [name for name in EMULATOR_NEEDS if find_spec(name) is None]
    if not missing:
        return None
    return (
        f"the emulator needs {', '.join(missing)}",
        f"run `make test-neuron`, which installs them, or unset {VARIABLE}",
    )


def _emulator(instance: Instance | None) -> Runtime:
    from .emulator import EmulatorRuntime

    return EmulatorRuntime()


def _nxd(instance: Instance | None) -> Runtime:
    from .nxd import NxdRuntime

    return NxdRuntime(instance)


RUNTIMES: dict[str, Callable[[Instance | None], Runtime]] = {"nxd": _nxd, "emulator": _emulator}
LIBRARY = "transformers_neuronx"  # has networks and graphs of its own: no `Runtime`
NAMES = (*RUNTIMES, LIBRARY)


def asked() -> str:
    """The name in the environment, empty if it has none. Raises OptionError for another one."""
    name = os.environ.get(VARIABLE, "")
    if name and name not in NAMES:
        raise OptionError(f"{VARIABLE} is {name!r}, must be one of {', '.join(NAMES)}, or unset")
    return name


def fault(name: str) -> sdk.Fault | None:
    """Why the runtime called `name`, or without a name any for NeuronCores, cannot run with what is
    installed here; None if it can."""
    return emulator_fault() if name == "emulator" else sdk.installed().fault(name)


def choose() -> str:
    """The name of the runtime to compile and run with: that which is asked for, or else the one
    that the installed SDK is for. Raises BackendError, with a remedy, where it cannot run."""
    name = asked()
    if found := fault(name):
        raise BackendError("; ".join(found))
    return name or sdk.installed().runtime() or ""


def open_runtime(name: str, instance: Instance | None) -> Runtime:
    """The runtime called `name`, which is not `LIBRARY`, to compile for `instance` or, without one,
    for this machine."""
    return RUNTIMES[name](instance)
