"""The runtimes by name, and which is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

from lmi_multi.errors import BackendError, OptionError
from lmi_multi.instances import Instance

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
    if fault := emulator_fault():
        raise BackendError("; ".join(fault))
    from .emulator import EmulatorRuntime

    return EmulatorRuntime()


RUNTIMES: dict[str, Callable[[Instance | None], Runtime]] = {"emulator": _emulator}


def choose() -> str:
    """The name of the runtime to compile and run with. Raises BackendError where there is none."""
    name = asked()
    if not name:
        raise BackendError(f"this version runs on Neuron only emulated; set {VARIABLE}=emulator")
    return name


def asked() -> str:
    """The name in the environment, empty if it has none. Raises OptionError for another one."""
    name = os.environ.get(VARIABLE, "")
    if name and name not in RUNTIMES:
        raise OptionError(f"{VARIABLE} is {name!r}, must be one of {', '.join(RUNTIMES)}")
    return name


def open_runtime(name: str, instance: Instance | None) -> Runtime:
    """The runtime called `name`, to compile for `instance` or, without one, for this machine."""
    return RUNTIMES[name](instance)
