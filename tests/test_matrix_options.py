"""pytest's own options of this suite, in a process of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest


def collect(backend: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "tests/test_matrix.py", "tests/test_prompts.py"]
    return subprocess.run(
        [*command, "--collect-only", "--backend", backend], capture_output=True, text=True
    )


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_backend_picks_its_cells(backend: str) -> None:
    found = collect(backend)
    assert found.returncode == 0
    tests = [line for line in found.stdout.splitlines() if "::" in line]
    assert len(tests) > 100
    assert all(f"[{backend}-" in test for test in tests)


def test_an_unknown_backend_is_named() -> None:
    found = collect("nonsense")
    assert found.returncode == 4
    assert "--backend is 'nonsense', must be one of cuda, neuron, cpu" in found.stderr
