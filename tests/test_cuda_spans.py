"""Where a GPU's share of an artifact lies in its files. Reading it needs no GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch
from lmi_multi.backends.cuda import loading
from lmi_multi.backends.cuda.loading import Span, plan_spans
from torch import Tensor

from lmi_multi import fit
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.convert import convert
from lmi_multi.checkpoint.layout import Stored
from lmi_multi.errors import CheckpointError
from tests import tiny_models


def read(spans: Iterable[Span], room: int = 300) -> None:
    """Fill the targets as threads do where there are no kernels, through so many bytes."""
    pinned = torch.empty((3, room // 3), dtype=torch.uint8)
    for span in spans:
        for chunk in span.chunks():
            with chunk.path.open("rb", buffering=0) as file:
                loading.bring(file, chunk, pinned)


def poisoned(artifact: Artifact, size: int, names: set[str] | None = None) -> dict[str, Tensor]:
    return {
        t.name: torch.full(t.local_shape(size), 77, dtype=t.dtype) for t in artifact.wanted(names)
    }


def entries(artifact: Artifact, tensors: dict[str, Tensor]) -> Iterator[tuple[Stored, Tensor]]:
    return ((t, tensors[t.name]) for t in artifact.wanted(tensors))


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They want a GPU."""
    monkeypatch.setattr(loading.kernels, "missing", lambda: "for a GPU")


@pytest.fixture(scope="module", params=["t5", "llama-mqa-biased-tied", "gpt2", "bloom"])
def source(request: pytest.FixtureRequest, checkpoints: Path) -> Path:
    return tiny_models.checkpoint(checkpoints, request.param)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("stored", [1, 2])
def test_any_degree_from_any_files(
    monkeypatch: pytest.MonkeyPatch,
    source: Path,
    tmp_path: Path,
    stored: int,
    quantize: str | None,
) -> None:
    """Rows and columns, parts of one file and of two, replicated heads, the padded vocabulary;
    through less memory than a row has, or than some have."""
    monkeypatch.setattr(loading, "CHUNK", 500)
    artifact = convert(
        source, tmp_path / "a", dtype="fp32", quantize=quantize, tensor_parallel=stored
    )
    for size in (1, 2, 4):
        for rank in range(size):
            tensors = poisoned(artifact, size)
            read(plan_spans(artifact, rank, size, entries(artifact, tensors)))
            expected = artifact.load_rank(rank, size)
            assert set(tensors) == set(expected)
            for name, tensor in expected.items():
                assert torch.equal(tensors[name], tensor), (name, rank, size)


def test_a_stage_reads_its_own_tensors_alone(checkpoints: Path) -> None:
    artifact = tiny_models.artifact(checkpoints, "t5")
    names = artifact.stages(2)[1].tensors(t.name for t in artifact.stored)
    assert 0 < len(names) < len(artifact.stored)
    tensors = poisoned(artifact, 2, names)
    spans = list(plan_spans(artifact, 1, 2, entries(artifact, tensors)))
    read(spans)
    expected = artifact.load_rank(1, 2, names)
    assert set(tensors) == set(expected) == names
    assert all(torch.equal(tensors[name], expected[name]) for name in names)
    assert sum(s.target.numel() for s in spans) <= artifact.tensor_bytes(1, 2, names)


def test_a_file_cut_short(checkpoints: Path, tmp_path: Path) -> None:
    made = convert(tiny_models.checkpoint(checkpoints, "gpt2"), tmp_path / "a", dtype="fp32")
    spans = list(plan_spans(made, 0, 1, entries(made, poisoned(made, 1))))
    with made.rank_path(0).open("r+b") as file:
        file.truncate(made.rank_path(0).stat().st_size - 1)
    with pytest.raises(CheckpointError, match="became shorter"):
        read(spans)


def test_the_buffers_are_those_of_the_estimates() -> None:
    assert fit.BUFFERS == loading.THREADS * loading.PIECES * loading.PIECE


class Threads:
    """Runs at most `most` at once, then starts no more."""

    def __init__(self, most: int) -> None:
        self.left, self.started = most, list[threading.Thread]()

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self.started:
            thread.join(timeout=10)

    def submit(self, work: Callable[..., None], *given: object) -> Future[None]:
        if not self.left:
            raise RuntimeError("can't start new thread")
        self.left -= 1
        done: Future[None] = Future()
        self.started.append(threading.Thread(target=lambda: done.set_result(work(*given))))
        self.started[-1].start()
        return done


def test_threads_that_cannot_start_are_an_error_and_no_wait(
    monkeypatch: pytest.MonkeyPatch, checkpoints: Path
) -> None:
    made, pool = tiny_models.artifact(checkpoints, "gpt2"), Threads(3)
    event = SimpleNamespace(record=lambda _: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(loading, "ThreadPoolExecutor", lambda _: pool)

    def send(queue: SimpleQueue[Span | None], *_: object) -> None:
        while queue.get() is not None:
            pass

    monkeypatch.setattr(loading, "_send", send)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        loading.read_spans(
            plan_spans(made, 0, 1, entries(made, poisoned(made, 1))), torch.device("cpu")
        )
    assert len(pool.started) == 3 and not any(t.is_alive() for t in pool.started)
