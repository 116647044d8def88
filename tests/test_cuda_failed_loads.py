"""What is left of a model that cannot be made on a GPU, and what is said; GPUs are stood in for."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lmi_multi.backends.cuda import BACKEND, backend, kernels
from torch import Tensor

import lmi_multi
from lmi_multi import model as model_module
from lmi_multi.backends import cpu
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.errors import BackendError, CapacityError, CheckpointError, LmiError, OptionError
from tests import tiny_models

GIB = 2**30


@pytest.fixture
def artifact(checkpoints: Path) -> Artifact:
    return tiny_models.artifact(checkpoints, "gpt2")


@pytest.fixture
def given_back(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often memory has been given back to the driver, of four GPUs of 80 GiB."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    return calls


def load(artifact: Artifact) -> Any:
    return BACKEND.load(artifact, tensor_parallel=1, max_batch=2, max_tokens=50)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (torch.OutOfMemoryError("9 GiB\nmore"), CapacityError, "cuda:0 has no room .*: 9 GiB$"),
        (LmiError("some line"), LmiError, "some line"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["memory", "error", "interrupt"],
)
def test_a_load_that_fails_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
    artifact: Artifact,
    given_back: list[str],
    error: BaseException,
    kind: type[BaseException],
    said: str | None,
) -> None:
    """Not even in the frames that the error has gone through, which the caller may keep."""
    kept: list[weakref.ref[Tensor]] = []

    def read(*_: object) -> None:
        weights = torch.zeros(1000)
        kept.append(weakref.ref(weights))
        raise error

    monkeypatch.setattr(backend, "load_rank", read)
    with pytest.raises(kind, match=said) as raised:
        load(artifact)
    assert raised.value is not None
    assert given_back == ["empty"]
    assert [ref() for ref in kept] == [None]


def test_other_gpus_are_asked_only_for_advice(
    monkeypatch: pytest.MonkeyPatch, artifact: Artifact, given_back: list[str]
) -> None:
    """One that is somebody else's is no reason not to load a model elsewhere."""
    asked: list[int] = []
    free = 70 * GIB

    def ask(index: int) -> tuple[int, int]:
        asked.append(index)
        if index == 2:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return free, 80 * GIB

    monkeypatch.setattr(torch.cuda, "mem_get_info", ask)
    monkeypatch.setattr(backend, "_open", lambda *given: None)
    load(artifact)
    assert set(asked) == {0}
    free = 1000
    with pytest.raises(CapacityError, match="does not fit at tensor_parallel=1"):
        load(artifact)
    assert set(asked) == {0, 1, 2, 3}
    with pytest.raises(BackendError, match=r"cuda:2 cannot be used: CUDA error: out of memory$"):
        BACKEND.load(artifact, tensor_parallel=4, max_batch=2, max_tokens=50)


def test_a_model_that_cannot_be_made_closes_its_executor(
    monkeypatch: pytest.MonkeyPatch, checkpoints: Path
) -> None:
    closed: list[str] = []
    real = cpu.BACKEND.load

    def opened(*given: Any, **keywords: Any) -> Any:
        executor = real(*given, **keywords)
        monkeypatch.setattr(executor, "close", lambda: closed.append("closed"))
        return executor

    def broken(folder: Path) -> None:
        raise CheckpointError("tokenizer.json is broken")

    monkeypatch.setattr(cpu.BACKEND, "load", opened)
    monkeypatch.setattr(model_module, "load_tokenizer", broken)
    with pytest.raises(CheckpointError, match="is broken"):
        lmi_multi.load(tiny_models.checkpoint(checkpoints, "gpt2"), backend="cpu")
    assert closed == ["closed"]


@pytest.mark.parametrize("name", ["encode", "score"])
def test_no_memory_for_texts_is_said(
    monkeypatch: pytest.MonkeyPatch, checkpoints: Path, name: str
) -> None:
    def short(*_: object) -> None:
        raise torch.OutOfMemoryError("9 GiB are missing\nmore")

    folder = tiny_models.checkpoint(checkpoints, "gpt2")
    with lmi_multi.load(folder, backend="cpu", max_batch=2, max_tokens=40) as model:
        monkeypatch.setattr(model.engine.executor, name, short)
        with pytest.raises(
            CapacityError, match=rf"no memory to {name} 3 at once.*9 GiB are missing$"
        ):
            getattr(model.engine, name)([None, None, None])


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"pipeline_parallel": None}, "pipeline_parallel is None"),
        ({"pipeline_parallel": 0}, "pipeline_parallel is 0"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_tokens": "9"}, "max_tokens is '9'"),
    ],
)
def test_wrong_sizes_are_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, keywords: dict[str, Any], said: str
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(model_module, "check_ranks", never)
    with pytest.raises(OptionError, match=said):
        lmi_multi.load("demo", backend="cpu", **keywords)


@pytest.mark.parametrize("value", ["off", "no", "2"])
def test_a_switch_is_0_or_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str) -> None:
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path)
    monkeypatch.setenv(kernels.SWITCH, value)
    said = f"LMI_MULTI_CUDA_KERNELS is '{value}'; allowed: 0 or 1"
    with pytest.raises(OptionError, match=said):
        kernels.missing.__wrapped__()
