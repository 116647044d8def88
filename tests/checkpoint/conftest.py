"""Checkpoints that several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from .tiny import llama_state, write


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A fresh Llama checkpoint that the test may break."""
    return write(tmp_path / "checkpoint", llama_state())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LMI_MULTI_CACHE", str(folder))
    return folder
