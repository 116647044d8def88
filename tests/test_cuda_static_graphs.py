"""Captured steps, searches and prefills whose graphs are as static as a GPU's: static_graphs.py."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lmi_multi.backends.cuda import ahead, capturing, executor, inputs
from lmi_multi.backends.cuda.beams import BeamKind
from torch import Tensor

from tests import tiny_models
from tests.cuda_stand_ins import stand_in
from tests.static_graphs import Graph, NotCapturableError, capture, static
from tests.test_cuda_ahead import open_model
from tests.test_cuda_graphs import SEARCHES, assert_same_as_cpu, cpu_model, prompts

REAL_CAPTURE = capturing.capture


@pytest.fixture(autouse=True)
def _static(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    static(monkeypatch, torch.ops.lmi_multi)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(("family", "program_rows"), [("t5", 8), ("llama-gqa", 0), ("bloom", 8)])
def test_tokens_are_those_of_the_cpu(folder: Path, family: str, program_rows: int) -> None:
    model = open_model(folder, family, program_rows)
    opened: Any = model.engine.executor
    made = [opened._fed, opened._ahead._graphs, opened._prefill_graphs]
    assert_same_as_cpu(folder, family, model)
    for own in made:
        assert max(graph.replays for graph in own._pool) > 1


@pytest.mark.parametrize("family", ["gpt2", "llama-gqa"])
def test_graphs_are_captured_while_tokens_are_unread(folder: Path, family: str) -> None:
    """Answers that end one by one, so that there is a graph to capture whenever fewer rows go on,
    which is before the last step's tokens are read."""
    own, lengths = (
        prompts(8, 4),
        [{"max_new_tokens": 4 + 2 * i, "ignore_eos": True} for i in range(8)],
    )
    with cpu_model(folder, family) as cpu, open_model(folder, family) as model:
        opened: Any = model.engine.executor
        expected = [c.token_ids for c in cpu.generate(own, lengths)]
        assert [c.token_ids for c in model.generate(own, lengths)] == expected
        assert {size for size, _ in opened._ahead._graphs._captured} == {1, 2, 4, 8}


@pytest.mark.parametrize("family", ["t5", "llama-gqa"])
def test_searches_begin_and_end_without_another_capture(folder: Path, family: str) -> None:
    """As many at once as there are rows, of which each ends at a time of its own and makes room for
    another; then the same again, in the same graphs."""
    own = prompts(6, 11)
    with cpu_model(folder, family) as cpu, open_model(folder, family) as model:
        opened: Any = model.engine.executor
        for options in SEARCHES:
            lengths = [{"max_new_tokens": n, **options} for n in (5, 9, 7, 6, 8, 5)]
            expected = cpu.generate(own, lengths)
            made = []
            for _ in range(2):
                found = model.generate(own, lengths)
                assert [c.token_ids for c in found] == [c.token_ids for c in expected]
                made.append(len(opened._fed._captured))
            assert made[0] == made[1]
        captured = opened._fed._captured
        searched = [g for (_, kind), g in captured.items() if isinstance(kind, BeamKind)]
        assert len(searched) > 4
        assert sum(graph.replays for graph in searched) > 40
        assert tiny_models.is_clean(model)


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x * x.sum().item(),
        lambda x: x + torch.tensor([1.0, 2.0]),
        lambda x: x[x > 0],
        lambda x: x if torch.equal(x, x) else -x,
        lambda x: x.nonzero(),
    ],
)
def test_what_waits_for_the_device_is_refused(body: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(2)
    with pytest.raises(NotCapturableError):
        capture(lambda: body(x), None, [])


def test_graphs_are_static() -> None:
    """What is filled counts, what is replaced does not; a capture computes nothing; and results are
    there until another graph of the pool is replayed."""
    pool: list[Graph] = []
    at = {"x": torch.ones(2), "y": torch.zeros(2)}
    graph = capture(lambda: at["y"].add_(at["x"]) * 2, None, pool)
    assert at["y"].tolist() == [1, 1]  # of the run before
    at["x"].fill_(3)
    assert graph.replay().tolist() == [8, 8]
    at["x"] = torch.zeros(2)
    found = graph.replay()
    assert found.tolist() == [14, 14]
    capture(lambda: at["x"] + 1, None, pool).replay()
    assert found.isnan().all()


@pytest.mark.parametrize("where", ["body", "end"])
def test_a_capture_without_memory_ends_on_the_callers_stream(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Memory that torch lacks, and memory that the driver lacks for the graph when it ends: torch
    then leaves its own stream the current one."""
    streams = ["the caller's"]
    calls: list[str] = []

    @contextmanager
    def stream(chosen: str) -> Iterator[None]:
        before = streams[0]
        streams[0] = chosen
        try:
            yield
        finally:
            streams[0] = before

    @contextmanager
    def graph(*_: object, stream: Any, **__: object) -> Iterator[None]:
        streams[0] = stream.name
        yield
        raise RuntimeError("CUDA error: out of memory")

    class Stream:
        name = "the graphs'"

        def wait_stream(self, other: object) -> None:
            pass

        synchronize = lambda self: None  # noqa: E731

    def body() -> Tensor:
        calls.append(where)
        if where == "body" and len(calls) == 2:
            raise torch.OutOfMemoryError("no room")
        return torch.ones(1)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[0])
    monkeypatch.setattr(capturing, "run", lambda work, stream: work())
    with pytest.raises(torch.OutOfMemoryError):
        REAL_CAPTURE(body, Stream(), None)  # type: ignore[arg-type]
    assert streams == ["the caller's"] and len(calls) == 2


def test_a_closed_model_gives_its_memory_back(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """When torch is asked to give back what it keeps, cache, weights and programs are gone."""
    model = open_model(folder, "t5")
    model.generate(prompts(3, 1), max_new_tokens=5)
    opened: Any = model.engine.executor
    kept = [opened._cache._blocks, *opened._network.weights.decoder.layers]
    kept += opened._fed._programs.values()
    alive = [weakref.ref(each) for each in kept]
    del kept
    left: list[int] = []

    def empty_cache() -> None:
        left.append(sum(ref() is not None for ref in alive))
        raise RuntimeError("an illegal memory access was encountered")  # that is no news to anybody

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    opened._device = torch.device("cuda", 0)
    model.close()
    assert left == [0]


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3}, {"num_beams": 3}], ids=str)
def test_a_step_without_memory_costs_one_request(
    monkeypatch: pytest.MonkeyPatch, folder: Path, options: dict[str, Any]
) -> None:
    """Wherever memory ends, whatever was under way then, the others get what they would have."""
    own, failed = prompts(3, 5), 0
    with cpu_model(folder, "t5") as cpu, open_model(folder, "t5") as model:
        expected = [c.token_ids for c in cpu.generate(own, max_new_tokens=9, **options)]
        places = (
            (executor.CudaExecutor, "_prepare"),
            (executor.CudaExecutor, "_encode_to_cache"),
            (executor.CudaExecutor, "_draw"),
            (inputs.StepInputs, "fill"),
            (inputs.StepInputs, "feed"),
            (ahead.Ahead, "start"),
            (ahead.Ahead, "begin"),
            (ahead.Ahead, "_feed"),
            (Graph, "replay"),
        )
        for (owner, name), number in itertools.product(places, range(1, 4)):
            calls = itertools.count(1)
            method = getattr(owner, name)

            def short(
                *given: Any, method: Any = method, calls: Any = calls, number: int = number
            ) -> Any:
                if next(calls) == number:
                    raise torch.OutOfMemoryError("no room")
                return method(*given)

            with monkeypatch.context() as patched:
                patched.setattr(owner, name, short)
                found = model.generate(own, max_new_tokens=9, **options)
            ended = [c.finish_reason == "out_of_memory" for c in found]
            assert sum(ended) == (next(calls) > number), (name, number)
            failed += sum(ended)
            for answer, tokens, over in zip(found, expected, ended, strict=True):
                assert over or answer.token_ids == tokens, (name, number)
            assert tiny_models.is_clean(model)
        assert failed > 8
