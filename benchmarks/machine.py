"""The machine, the versions, and who else was using the machine meanwhile."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psutil
import torch
from pydantic import BaseModel, ConfigDict

from lmi_multi.cli.report import processor

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "numpy")
QUIET = 0.05  # of the cores may be busy with something else


def machine(device: str) -> dict[str, str | int]:
    """Processor, cores, memory, system and, where there is one, GPU."""
    facts: dict[str, str | int] = {
        "processor": processor(),
        "cores": psutil.cpu_count(logical=False) or 1,
        "threads": psutil.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def versions() -> dict[str, str]:
    """Python, libraries, and lmi_multi with its commit."""
    found = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    return found | {"lmi_multi": f"{version('lmi_multi')} at {_commit()}"}


def _commit() -> str:
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "lmi_multi", "backends", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "an unknown commit"
    return f"{head} with uncommitted changes" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(("git", *arguments), cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def busy_at_start() -> str:
    """A warning if the load average exceeds the cores; else nothing."""
    load, cores = os.getloadavg()[0], psutil.cpu_count() or 1
    return f"warning: the load average is {load:.1f} on {cores} cores" if load > cores else ""


def copy_bandwidth(device: str, rounds: int = 7) -> float:
    """Bytes read plus bytes written a second while torch copies a large tensor, median."""
    copies = 10 if device.startswith("cuda") else 1  # a GPU's launch and the wait for it are 30 us
    size = min(2**30, psutil.virtual_memory().available // 8)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        target[-1].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size * copies / median(seconds)


class Load(BaseModel):
    """Other work on the machine: one-minute load averages before and after, and `others`, how
    many cores other processes (or, under a hypervisor, other guests) kept busy meanwhile."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    before: float
    after: float
    others: float
    cores: int

    @property
    def quiet(self) -> bool:
        """Whether the times can be trusted. Load averages hold our own threads, and the past."""
        return self.others <= QUIET * self.cores


class Watch:
    """Watches the machine from its making until `stop`."""

    def __init__(self) -> None:
        self._before = os.getloadavg()[0]
        self._start, self._busy, self._own = time.monotonic(), _busy(), time.process_time()

    def stop(self, children: float = 0.0) -> Load:
        """What went on since; `children` are the seconds of processors that ours have used."""
        elapsed = time.monotonic() - self._start
        others = (_busy() - self._busy) - (time.process_time() - self._own) - children
        return Load(
            before=round(self._before, 2),
            after=round(os.getloadavg()[0], 2),
            others=round(max(0.0, others) / elapsed, 2),
            cores=psutil.cpu_count() or 1,
        )


def _busy() -> float:
    """Seconds that all cores together have spent at work since boot."""
    times = psutil.cpu_times()
    kinds = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(getattr(times, kind, 0.0) for kind in kinds)
