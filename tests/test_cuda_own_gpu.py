"""Under torchrun a model of a process's own lies on the GPU of its number, whoever calls it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lmi_multi.backends.cuda import BACKEND, backend
from lmi_multi.backends.cuda.backend import _devices

from lmi_multi.backends.base import Availability
from lmi_multi.errors import CapacityError
from lmi_multi.fallback import loading
from lmi_multi.parallel.grid import Grid
from tests import tiny_models
from tests.test_cuda_ahead import open_model, programs  # noqa: F401

TOLD = {"RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun tells the third of four processes of its second host."""
    for name, value in (TOLD | {"MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)


def see(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_without_torchrun_every_gpu_may_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, 4)
    assert _devices(Grid(1, 1)) == {0: 0, 1: 1, 2: 2, 3: 3}


@pytest.mark.usefixtures("told")
def test_a_process_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, 4)
    assert _devices(Grid(1, 1)) == {0: 2}
    assert _devices(Grid(4, 2)) == {6: 2}
    see(monkeypatch, 1)  # the only one that it is shown
    assert _devices(Grid(1, 1)) == {0: 0}
    see(monkeypatch, 2)
    for grid in (Grid(1, 1), Grid(4, 2)):
        with pytest.raises(CapacityError, match="LOCAL_RANK is 2, but this machine has 2 GPUs"):
            _devices(grid)


@pytest.mark.usefixtures("told")
def test_load_builds_there(monkeypatch: pytest.MonkeyPatch, checkpoints: Path) -> None:
    see(monkeypatch, 4)
    asked: list[Any] = []
    opened: list[torch.device] = []

    def free(index: int) -> tuple[int, int]:
        asked.append(index)
        return 70 * 2**30, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext(asked.append(index)))
    monkeypatch.setattr(backend, "_open", lambda *given: opened.append(given[-1]))
    artifact = tiny_models.artifact(checkpoints, "gpt2")
    BACKEND.load(artifact, tensor_parallel=1, max_batch=2, max_tokens=50)
    there = torch.device("cuda", 2)
    assert opened == [there] and set(asked) == {2, there}


@pytest.mark.usefixtures("told")
def test_the_fallback_does_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    state = Availability("cuda", True, "stood in for")
    monkeypatch.setattr(type(BACKEND), "probe", lambda self: state)
    see(monkeypatch, 4)
    found = [loading._device(name) for name in ("auto", "cuda", "cpu")]
    assert found == ["cuda:2", "cuda:2", "cpu"]
    monkeypatch.delenv("RANK")
    assert loading._device("auto") == "cuda"


@pytest.mark.usefixtures("programs")
def test_calls_are_made_on_the_executors_gpu(tmp_path: Path) -> None:
    """The calling thread's current GPU may be another one."""
    entered: list[str] = []

    class Guard:
        def __enter__(self) -> None:
            entered.append("in")

        def __exit__(self, *error: object) -> None:
            entered.append("out")

    model = open_model(tmp_path, "gpt2")
    own: Any = model.engine.executor
    own._gpu = Guard()
    for call in (
        lambda: model.generate([[5, 6]], max_new_tokens=1),
        lambda: model.encode([[5, 6]]),
        lambda: model.score([[5]], [[6]]),
        model.close,
    ):
        entered.clear()
        call()
        assert entered == ["in", "out"]
