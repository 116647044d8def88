"""What `doctor` finds out about this machine, one small function a subject.

Nothing here raises: a part that is missing or broken is what the report is for.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

import psutil

CORE = ("lmi_multi", "torch", "transformers", "huggingface_hub", "safetensors", "numpy")
PACKAGES = (*CORE, "boto3", "awscrt")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
PREFIXES = ("AWS_", "HF_", "LMI_MULTI_", "NEURON_")
SECRETS = ("CREDENTIALS", "TOKEN", "SECRET", "PASSWORD", "KEY")
LOW_DISK = 10 * 2**30
LOW_MEMORY = 2 * 2**30


class BackendState(TypedDict):
    """One backend: whether it can run here, and if not, why and what to do."""

    name: str
    available: bool
    reason: str
    remedy: str
    devices: list[str]


class Cache(TypedDict):
    """One cache folder, in bytes."""

    name: str
    path: str
    bytes: int
    free: int | None


class Report(TypedDict):
    """All of it; `ok` is false where the core cannot run."""

    ok: bool
    python: dict[str, str]
    machine: dict[str, str | int]
    torch: dict[str, str | int | bool | None]
    packages: dict[str, str | None]
    backends: list[BackendState]
    memory: dict[str, int]
    caches: list[Cache]
    environment: dict[str, str]
    remedies: list[str]


def collect() -> Report:
    """Look at everything once."""
    report = Report(
        ok=True,
        python=python_state(),
        machine=machine_state(),
        torch=torch_state(),
        packages={name: package_version(name) for name in PACKAGES},
        backends=backend_states(),
        memory=memory_state(),
        caches=[cache_state(name, path) for name, path in cache_paths().items()],
        environment=settings(os.environ),
        remedies=[],
    )
    report["ok"] = any(state["available"] for state in report["backends"])
    report["remedies"] = remedies(report)
    return report


def python_state() -> dict[str, str]:
    """The interpreter."""
    return {
        "version": platform.python_version(),
        "implementation": platform.python_implementation(),
        "executable": sys.executable,
    }


def machine_state() -> dict[str, str | int]:
    """Operating system and processor."""
    return {
        "platform": platform.platform(),
        "processor": processor(),
        "cores": psutil.cpu_count(logical=False) or 1,
        "threads": psutil.cpu_count() or 1,
    }


def processor(source: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name; Linux tells it in a file, Python itself mostly does not know."""
    try:
        for line in source.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def torch_state() -> dict[str, str | int | bool | None]:
    """Torch and what it was built for; `error` where it cannot be imported."""
    try:
        torch = import_module("torch")
        return {
            "version": str(torch.__version__),
            "cuda_build": torch.version.cuda,
            "cuda_devices": int(torch.cuda.device_count()),
            "threads": int(torch.get_num_threads()),
            "error": None,
        }
    except Exception as error:  # a broken installation fails in many ways
        return {"version": package_version("torch"), "error": _reason(error)}


def package_version(name: str) -> str | None:
    """The installed version of a distribution; None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def backend_states() -> list[BackendState]:
    """Every backend, probed; the core itself is the one entry where it cannot be imported."""
    try:
        from lmi_multi.backends import available

        found = available()
    except Exception as error:  # a broken installation fails in many ways
        return [
            BackendState(
                name="core",
                available=False,
                reason=_reason(error),
                remedy="reinstall lmi_multi and torch into a fresh virtual environment",
                devices=[],
            )
        ]
    return [
        BackendState(
            name=state.name,
            available=state.ok,
            reason=state.reason,
            remedy=state.remedy,
            devices=list(state.devices),
        )
        for state in found
    ]


def memory_state() -> dict[str, int]:
    """Memory of the machine in bytes."""
    memory = psutil.virtual_memory()
    return {"total": int(memory.total), "available": int(memory.available)}


def cache_paths() -> dict[str, Path]:
    """The folders that hold downloads and converted models."""
    paths: dict[str, Path] = {}
    try:
        from lmi_multi.checkpoint.files import cache_dir

        paths["artifacts"] = cache_dir()
    except Exception:  # reported by `backend_states`
        pass
    try:
        from huggingface_hub import constants

        paths["hub"] = Path(constants.HF_HUB_CACHE)
    except Exception:  # reported as a missing package
        pass
    return paths


def cache_state(name: str, path: Path) -> Cache:
    """A cache folder's size, and what is free on its disk."""
    return Cache(name=name, path=str(path), bytes=folder_bytes(path), free=disk_free(path))


def folder_bytes(path: Path) -> int:
    """Bytes of all files below `path`, a file with several names counted once."""
    total = 0
    seen: set[tuple[int, int]] = set()
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                stat = (Path(folder) / name).lstat()
            except OSError:  # removed meanwhile
                continue
            if (stat.st_dev, stat.st_ino) not in seen:
                seen.add((stat.st_dev, stat.st_ino))
                total += stat.st_size
    return total


def disk_free(path: Path) -> int | None:
    """Free bytes on the disk that holds `path`, or would."""
    for place in (path, *path.parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that change what this package does; of secrets only that they are set."""
    return {
        name: "(set)" if any(word in name for word in SECRETS) else value
        for name, value in sorted(environment.items())
        if name in VARIABLES or name.startswith(PREFIXES)
    }


def remedies(report: Report) -> list[str]:
    """One line for each thing to mend."""
    lines = [
        f"{state['name']}: {state['remedy']}"
        for state in report["backends"]
        if not state["available"] and state["remedy"]
    ]
    for cache in report["caches"]:
        if cache["free"] is not None and cache["free"] < LOW_DISK:
            lines.append(
                f"disk of {cache['path']}: {cache['free'] / 2**30:.1f} GiB free; remove files, or "
                f"set {_variable(cache['name'])} to a folder on a larger disk"
            )
    if report["memory"]["available"] < LOW_MEMORY:
        free = report["memory"]["available"] / 2**30
        lines.append(f"memory: {free:.1f} GiB available; end other programs")
    return lines


def _variable(cache: str) -> str:
    return {"artifacts": "LMI_MULTI_CACHE", "hub": "HF_HOME"}[cache]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
