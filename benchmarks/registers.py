"""Show what ptxas says of the kernels: registers, shared memory, spills.

    python -m benchmarks.registers [--arch 90 --results FOLDER]

Compiles them as `setup_kernels.py` does (nvcc is needed, a GPU is not) and throws the library away.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import groupby
from pathlib import Path

import setup_kernels
from benchmarks.machine import ROOT, versions

RESULTS = ROOT / "benchmarks" / "results"
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Compiled:
    """One instance of a kernel for one architecture. `shared`: bytes that are fixed; what a launch
    asks for comes on top. `spilled`: bytes stored or loaded for want of registers."""

    kernel: str
    arch: str
    registers: int
    shared: int
    spilled: int


def read(report: str) -> Iterator[Compiled]:
    """What ptxas' report says of each kernel. Raises ValueError if an entry lacks its figures."""
    parts = _ENTRY.split(report)[1:]
    for symbol, arch, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        used, spills, shared = _USED.search(text), _SPILLS.search(text), _SHARED.search(text)
        if used is None or spills is None:
            raise ValueError(f"ptxas reports no registers or no spills of {symbol} for sm_{arch}")
        fixed = int(shared[1]) if shared else 0
        yield Compiled(name(symbol), arch, int(used[1]), fixed, int(spills[1]) + int(spills[2]))


def name(symbol: str) -> str:
    """A kernel's own name in its mangled one, where a number says how long each part is."""
    found, rest = symbol, re.sub(r"^_ZN?", "", symbol)
    while (size := re.match(r"\d+", rest)) is not None:
        end = size.end() + int(size[0])
        found, rest = rest[size.end() : end], rest[end:]
    return found


def table(kernels: Sequence[Compiled]) -> str:
    """Markdown: a line for each kernel and architecture, the most of all its instances."""
    lines = [
        "| kernel | sm | instances | registers | fixed shared memory, bytes | spills, bytes |",
        "| --- | --- | --: | --: | --: | --: |",
    ]

    def of(kernel: Compiled) -> tuple[str, str]:
        return kernel.kernel, kernel.arch

    for (kernel, arch), group in groupby(sorted(kernels, key=of), of):
        own = list(group)
        most = (max(getattr(k, what) for k in own) for what in ("registers", "shared", "spilled"))
        figures = " | ".join(map(str, most))
        lines.append(f"| `{kernel}` | {arch} | {len(own)} | {figures} |")
    return "\n".join(lines)


def compiler() -> str:
    """nvcc's release."""
    command = (str(setup_kernels.find_nvcc()), "--version")
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"V([\d.]+)", text)
    return found[1] if found else "of an unknown release"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", metavar="N", help="default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args()
    if options.arch and options.results == RESULTS:
        parser.error("--arch wants --results: the page that is kept is of all architectures")
    archs = options.arch or setup_kernels.ARCHS
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "kernels.so")
        try:
            report = setup_kernels.build(library, archs, os.cpu_count() or 1, print)
        except setup_kernels.BuildError as error:
            sys.exit(f"error: {error}")
        kernels = [*read(report)]
        size = library.stat().st_size
    spilled = sum(kernel.spilled for kernel in kernels)
    page = f"""# What ptxas says of the kernels

`python -m benchmarks.registers`, nvcc {compiler()}, lmi_multi {versions()["lmi_multi"]},
{date.today()}. Of a kernel's instances (types, head sizes, rows) the most; {len(kernels)} in all,
{spilled} bytes spilled. The library has {size / 2**20:.1f} MiB. A spill fails the build.

{table(kernels)}
"""
    options.results.mkdir(parents=True, exist_ok=True)
    target = options.results / "cuda-registers.md"
    target.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
