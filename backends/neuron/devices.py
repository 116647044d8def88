"""What Neuron hardware is here: devices, cores, instance type, and what stands in the way."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmi_multi.errors import BackendError

DEVICES = Path("/dev")
PRODUCT = Path("/sys/devices/virtual/dmi/id/product_name")
TOOL = "/opt/aws/neuron/bin/neuron-ls"
TOOL_SECONDS = 20


@dataclass(frozen=True)
class Core:
    """One NeuronCore as the runtime numbers it, and who holds it: a process id, or None."""

    index: int
    device: int
    memory: int
    owner: int | None = None


@dataclass(frozen=True)
class Host:
    """What a look at this machine found. `error` says why `cores` could not be listed."""

    devices: Sequence[str] = ()
    instance: str | None = None
    cores: Sequence[Core] = field(default=())
    error: str | None = None

    @property
    def free(self) -> list[Core]:
        """Cores that no other process holds."""
        return [core for core in self.cores if core.owner in (None, os.getpid())]


def look(devices: Path = DEVICES, product: Path = PRODUCT) -> Host:
    """Look at this machine; never raises."""
    found = tuple(str(path) for path in sorted(devices.glob("neuron[0-9]*"), key=_number))
    instance = instance_type(product)
    if not found:
        return Host((), instance)
    try:
        return Host(found, instance, parse(_neuron_ls()))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return Host(found, instance, (), str(error).strip().splitlines()[0])


def _number(path: Path) -> tuple[int, str]:
    """neuron10 comes after neuron9."""
    digits = path.name.removeprefix("neuron")
    return (int(digits) if digits.isdigit() else -1, path.name)


def instance_type(product: Path = PRODUCT) -> str | None:
    """The EC2 instance type by the machine's firmware, as `inf2.xlarge`; None if it tells none."""
    try:
        name = product.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return name if "." in name and " " not in name else None


def _neuron_ls() -> str:
    tool = TOOL if Path(TOOL).exists() else "neuron-ls"
    command = [tool, "-j"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS)
    if done.returncode:
        raise ValueError(f"neuron-ls failed: {(done.stderr or done.stdout).strip() or 'no output'}")
    return done.stdout


def parse(output: str) -> tuple[Core, ...]:
    """The cores in the JSON that `neuron-ls` prints, in the runtime's order.

    Ids of cores are taken where the tool tells them (`neuroncore_ids`), else counted over the
    devices. Raises ValueError that names what is missing.
    """
    try:
        listed = json.loads(output)
    except ValueError:
        raise ValueError(f"neuron-ls printed no JSON: {output.strip()[:80]!r}") from None
    if not isinstance(listed, list):
        raise ValueError("neuron-ls printed no list of devices")
    cores: list[Core] = []
    for device in listed:
        cores += _cores_of(device, len(cores))
    return tuple(cores)


def _cores_of(device: Any, first: int) -> list[Core]:
    try:
        count, memory = int(device["nc_count"]), int(device["memory_size"])
        number = int(device["neuron_device"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"neuron-ls lists a device without {error}") from None
    ids = device.get("neuroncore_ids") or range(first, first + count)
    owners = _owners(device.get("neuron_processes") or ())
    return [Core(int(i), number, memory // max(count, 1), owners) for i in ids]


def _owners(processes: Sequence[Mapping[str, Any]]) -> int | None:
    """The first process on a device. The tool does not say which of its cores a process holds,
    and those of one device are usually taken together."""
    return next((int(process["pid"]) for process in processes if "pid" in process), None)


def fault(host: Host, needed: int = 1) -> tuple[str, str] | None:
    """Why `needed` cores cannot be used here, and one line that helps; None if they can."""
    if not host.devices:
        if host.instance and host.instance.split(".")[0].rstrip("n") in ("inf2", "trn1", "trn2"):
            return (
                f"{host.instance} has NeuronCores, but there is no /dev/neuron0",
                "install the driver (aws-neuronx-dkms), load it with `modprobe neuron`, and in a "
                "container pass --device=/dev/neuron0",
            )
        return "no Neuron device (/dev/neuron0) here", "use backend='cpu', or an inf2 or trn host"
    if host.error:
        return (
            f"{_counted(len(host.devices), 'Neuron device')}, but no list of cores: {host.error}",
            "install aws-neuronx-tools and check `neuron-ls`",
        )
    if not host.cores:
        devices = _counted(len(host.devices), "Neuron device")
        return f"{devices}, but neuron-ls lists no core", "load the driver: `modprobe neuron`"
    return _taken(host, needed) if len(host.free) < needed else None


def _taken(host: Host, needed: int) -> tuple[str, str]:
    free, total = len(host.free), len(host.cores)
    wanted = f"{_counted(needed, 'NeuronCore')} {'is' if needed == 1 else 'are'} wanted"
    if needed > total:
        return f"{wanted}, but this host has {total}", "lower tensor_parallel"
    holders = sorted({core.owner for core in host.cores if core.owner not in (None, os.getpid())})
    several = len(holders) > 1
    by = f"process{'es' if several else ''} {', '.join(map(str, holders))}"
    end = f"end {'those processes' if several else 'that process'}"
    return (
        f"{wanted}, {free} of {total} are free; {'the others' if free else 'all'} are held by {by}",
        f"{end}, or lower tensor_parallel" if free else end,
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def choose(host: Host, degree: int) -> list[int]:
    """The `degree` free cores to use: neighbours, beginning at a multiple of the degree if some
    such run is free. Raises BackendError if too few neighbours are free."""
    free = {core.index for core in host.free}
    starts = [i for i in sorted(free) if all(i + n in free for n in range(degree))]
    if not starts:
        raise BackendError(
            f"{degree} neighbouring NeuronCores are wanted, free are "
            f"{', '.join(map(str, sorted(free))) or 'none'}"
        )
    first = next((start for start in starts if start % degree == 0), starts[0])
    return list(range(first, first + degree))
