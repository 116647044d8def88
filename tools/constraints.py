"""Writes constraints.txt: one set of pins that holds for Python 3.10 to 3.13.

Versions already pinned stay as long as they fit; `--upgrade` takes the newest instead. The
resolver lives in a temporary environment, so that it is no dependency of the project. Only
metadata is downloaded.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "constraints.txt"
TORCH = "torch==2.13.0"
# Torch pins its CUDA packages itself, by build: a pin of ours could only contradict it.
# Packages of other systems only are noise: the project is for Linux.
UNWANTED = re.compile(r"(nvidia|cuda|triton)[-_\w]*==|.*sys_platform == '(win32|emscripten)'")
HEADER = (
    "# Versions that development and CI install, on Python 3.10 to 3.13.\n"
    "# Written by `make constraints`; `make constraints UPGRADE=1` takes the newest.\n"
)


def resolve(arguments: list[str], pinned: str) -> str:
    """The pins that the resolver chooses, one a line."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        venv.create(place / "venv", with_pip=True)
        python = place / "venv" / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
        chosen, wanted = place / "chosen.txt", place / "wanted.txt"
        chosen.write_text(pinned)
        wanted.write_text(TORCH + "\n")
        command: list[str | Path] = [
            place / "venv" / "bin" / "uv",
            "pip",
            "compile",
            ROOT / "pyproject.toml",
        ]
        command += ["--all-extras", "--universal", "--python-version", "3.10", "--quiet"]
        command += ["--no-header", "--no-annotate", "--no-emit-index-url"]
        command += ["--constraints", wanted, "--output-file", chosen, *arguments]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        return chosen.read_text()


def main() -> None:
    """Resolve and write."""
    pinned = TARGET.read_text() if TARGET.exists() else ""
    lines = resolve(sys.argv[1:], pinned).splitlines()
    TARGET.write_text(HEADER + "".join(f"{x}\n" for x in lines if not UNWANTED.match(x)))


if __name__ == "__main__":
    main()
