"""The runtimes by name, and which is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable

from lmi_multi.errors import OptionError
from lmi_multi.instances import Instance

from .program import Runtime

VARIABLE = "LMI_MULTI_NEURON_RUNTIME"


def _emulator(instance: Instance | None) -> Runtime:
    from .emulator import EmulatorRuntime  # needs torch-xla and jaxlib

    return EmulatorRuntime()


RUNTIMES: dict[str, Callable[[Instance | None], Runtime]] = {"emulator": _emulator}


def asked() -> str:
    """The name in the environment, empty if it has none. Raises OptionError for another one."""
    name = os.environ.get(VARIABLE, "")
    if name and name not in RUNTIMES:
        raise OptionError(f"{VARIABLE} is {name!r}, must be one of {', '.join(RUNTIMES)}")
    return name


def open_runtime(name: str, instance: Instance | None) -> Runtime:
    """The runtime called `name`, to compile for `instance` or, without one, for this machine."""
    return RUNTIMES[name](instance)
