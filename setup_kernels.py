"""Compile the CUDA backend's kernels: backends/cuda/csrc/*.cu into backends/cuda/_kernels.so.

    python setup_kernels.py                       # sm_80, 86, 89, 90
    python setup_kernels.py --arch 90             # one GPU's alone; or LMI_MULTI_CUDA_ARCHS=90
    python setup_kernels.py --report ptxas.txt    # registers and spills of every kernel

The library uses torch's stable ABI and no libpython, so one file serves Python 3.10 to 3.13 and
torch 2.10 and later. nvcc and torch's headers are needed, neither a GPU nor a CUDA build of torch.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "backends" / "cuda" / "csrc"
LIBRARY = ROOT / "backends" / "cuda" / "_kernels.so"
ARCHS = ("80", "86", "89", "90")
# How the names of sources begin whose kernels are for sm_90a alone.
OF_HOPPER = ("gemm_", "prefill_long_")
TORCH_TARGET = "0x020a000000000000ULL"  # 2.10
SERIALIZED = "wgmma.mma_async instructions are serialized"  # ptxas says so and warns of nothing


class BuildError(Exception):
    """Why the kernels cannot be built, in a line."""


def find_nvcc() -> Path:
    """nvcc of CUDA_HOME if that is set, else of the path or the usual place. Raises BuildError."""
    if home := os.environ.get("CUDA_HOME"):
        found = shutil.which(Path(home, "bin", "nvcc"))
        if found is None:
            raise BuildError(f"nvcc was not found in CUDA_HOME, {home!r}: must be a CUDA toolkit")
        return Path(found)
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        raise BuildError("nvcc was not found: install the CUDA toolkit (12.8 or later)")
    return Path(found)


def torch_headers() -> Path:
    """The installed torch's include folder. Raises BuildError without one."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch was not found: its headers are needed")
    headers = Path(spec.origin).parent / "include"
    if not (headers / "torch" / "csrc" / "stable").is_dir():
        raise BuildError(
            f"{headers} has no headers of torch's stable ABI: torch must be 2.10 or later"
        )
    return headers


def archs_of(source: Path, archs: Sequence[str]) -> Sequence[str]:
    """Those of `archs` that a source is for: one of Hopper's own instructions for nothing else, if
    Hopper is among them."""
    return ("90a",) if source.stem.startswith(OF_HOPPER) and "90" in archs else archs


def targets(archs: Sequence[str]) -> list[str]:
    """nvcc's options for machine code of every architecture, and the last one's PTX for later
    ones. Raises BuildError on a name that is none."""
    for arch in archs:
        known = re.fullmatch("([0-9]{2,3})[af]?", arch)
        if known is None or int(known[1]) < 80:
            raise BuildError(
                f"an architecture (--arch, LMI_MULTI_CUDA_ARCHS) is {arch!r}, must be 80 or above, "
                "such as 90"
            )
    if not archs:
        raise BuildError("no architecture was named (--arch, LMI_MULTI_CUDA_ARCHS)")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    if not archs[-1].endswith("a"):  # PTX of such is for no other GPU
        codes[-1] = f"-gencode=arch=compute_{archs[-1]},code=[sm_{archs[-1]},compute_{archs[-1]}]"
    return codes


def compile_command(
    nvcc: Path, headers: Path, source: Path, target: Path, archs: Sequence[str]
) -> list[str]:
    """How one source becomes an object file; ptxas reports on stderr."""
    return [
        *(str(nvcc), "-c", str(source), "-o", str(target), "-std=c++20", "-O3", *targets(archs)),
        *("-isystem", str(headers), "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"),
        f'-DLMI_ARCHS="{" ".join(archs)}"',
        *("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"),
        *("-Xptxas", "-v,-warn-spills", "-Werror", "all-warnings"),
    ]


def link_command(nvcc: Path, objects: Sequence[Path], stubs: Path, target: Path) -> list[str]:
    """How the objects become the library."""
    return [
        *(str(nvcc), "-shared", "-cudart", "shared", "-o", str(target), *map(str, objects)),
        *(f"-L{stubs}", "-Xlinker", "--no-as-needed", "-ltorch_cpu", "-ltorch_cuda"),
    ]


def make_stubs(nvcc: Path, folder: Path) -> None:
    """Empty stand-ins for torch's libraries. The linker only notes their names: at run time the
    real ones are loaded before, and a torch for CPU has no libtorch_cuda.so to link with."""
    empty = folder / "empty.cpp"
    empty.touch()
    for name in ("libtorch_cpu.so", "libtorch_cuda.so"):
        made = [str(nvcc), "-shared", "-cudart", "none", "-o", str(folder / name), str(empty)]
        _run([*made, "-Xcompiler", "-fPIC", "-Xlinker", f"-soname={name}"])


def build(target: Path, archs: Sequence[str], jobs: int, say: Callable[[str], None]) -> str:
    """Compile and link into `target`; returns ptxas' report. Raises BuildError."""
    targets(archs)  # a wrong name is said before anything is compiled
    nvcc, headers = find_nvcc(), torch_headers()
    sources = sorted(SOURCES.glob("*.cu"))
    with tempfile.TemporaryDirectory() as name, _threads(jobs) as pool:
        folder = Path(name)
        objects = [folder / f"{source.stem}.o" for source in sources]

        def compile_one(source: Path, made: Path) -> str:
            own = archs_of(source, archs)
            say(f"compiling {source.name} for {', '.join(own)}")
            report = _run(compile_command(nvcc, headers, source, made, own))
            if SERIALIZED in report:
                say(f"slow: ptxas lets products wait for each other in {source.name} (--report)")
            return report

        reports = list(pool.map(compile_one, sources, objects))
        make_stubs(nvcc, folder)
        linked = folder / target.name
        _run(link_command(nvcc, objects, folder, linked))
        # A library that is in use must not change under its user: replace it whole.
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            shutil.copyfile(linked, beside)
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
    return "".join(reports)


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """What has not begun when there is an error, or Ctrl-C, is left."""
    with ThreadPoolExecutor(count) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _check_file(option: str, path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise BuildError(f"{option} is {str(path)!r}, must be a file in a folder that exists")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from None
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}".rstrip())
    return done.stderr


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compile the CUDA backend's kernels.")
    default = os.environ.get("LMI_MULTI_CUDA_ARCHS", " ".join(ARCHS))
    parser.add_argument("--arch", action="append", metavar="N", help=f"default: {default}")
    parser.add_argument("--jobs", type=_positive, default=os.cpu_count(), help="files at a time")
    parser.add_argument("--output", type=Path, default=LIBRARY, metavar="FILE")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write ptxas' report here")
    options = parser.parse_args(arguments)
    try:
        _check_file("--output", options.output)
        if options.report:
            _check_file("--report", options.report)
        archs = options.arch or default.replace(",", " ").split()
        report = build(options.output, archs, options.jobs, print)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if options.report:
        options.report.write_text(report)
    print(f"made {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
