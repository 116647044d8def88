"""The CUDA executor's captured steps, with everything that needs a GPU stood in for.

A graph is a list of the work that was captured, done anew at each replay; kernels are plain torch.
What is left is all that decides which row is fed what: places, flights, inputs, options. The same
with real graphs and kernels is in test_cuda_graphs.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lmi_multi.backends.cuda import (
    ahead,
    beams,
    capturing,
    executor,
    inputs,
)
from lmi_multi.backends.cuda.ops import Scratch
from torch import Tensor

from lmi_multi.backends.base import Executor
from lmi_multi.backends.drawing import draw
from lmi_multi.engine.batch import Row
from lmi_multi.model import Model
from lmi_multi.ops.beams import Beams
from lmi_multi.ops.rules import History, Rules
from lmi_multi.ops.sampling import SampleRow
from lmi_multi.parallel.collectives import SingleRank
from tests import tiny_models
from tests.cuda_stand_ins import Programs, stand_in
from tests.families import VOCAB
from tests.test_cuda_graphs import LIMITS, SEARCHES, assert_same_as_cpu, cpu_model, prompts

SAMPLED: tuple[dict[str, Any], ...] = (
    {},
    {"do_sample": True, "temperature": 0.8, "seed": 3},
    {"do_sample": True, "seed": 4, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
)
FAMILIES = ("t5", "gpt2", "llama-gqa", "bloom", "mistral-window")


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> Programs:
    """The stand-ins of all that needs a GPU; those of programs are returned."""
    return stand_in(monkeypatch)


def open_model(folder: Path, family: str, program_rows: int = 8) -> Model:
    artifact = tiny_models.artifact(folder, family)
    cpu = torch.device("cpu")
    opened: Executor = executor.CudaExecutor(
        artifact.spec,
        artifact.load_rank(0, 1),
        LIMITS,
        Scratch(cpu),
        SingleRank(),
        program_rows=program_rows,
    )
    return Model(artifact, "cuda", opened)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Where each row that was looked for in a flight was."""
    is_of, place, places = ahead.Flight.is_of, ahead.Flight.place, []

    def noted_all(self: ahead.Flight, rows: Sequence[Row]) -> bool:
        found = is_of(self, rows)
        if found:
            places.extend(range(len(rows)))
            assert [place(self, row) for row in rows] == list(range(len(rows)))
        return found

    def noted(self: ahead.Flight, row: Row) -> int | None:
        places.append(place(self, row))
        return places[-1]

    monkeypatch.setattr(ahead.Flight, "is_of", noted_all)
    monkeypatch.setattr(ahead.Flight, "place", noted)
    return places


@pytest.mark.parametrize("program_rows", [8, 2, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_cpu(
    folder: Path, family: str, found: list[int | None], program_rows: int, programs: Programs
) -> None:
    assert_same_as_cpu(folder, family, open_model(folder, family, program_rows))
    assert bool(programs.runs) == bool(program_rows)
    assert len(found) - found.count(None) > 100


def test_every_step_but_the_first_is_begun_ahead(folder: Path, found: list[int | None]) -> None:
    with open_model(folder, "gpt2") as model:
        model.generate(prompts(5, 2), max_new_tokens=12, ignore_eos=True)
        assert len(found) - found.count(None) == 5 * 11
        every: list[dict[str, Any]] = [
            {"repetition_penalty": 1.5},
            {"frequency_penalty": 0.5, "logit_bias": {5: 1.0}},
            {"no_repeat_ngram_size": 2, "logprobs": 3},
            {"bad_words": [[3, 4]], "forced_eos_token_id": 9},
        ]
        for own in every:
            found.clear()
            model.generate(prompts(5, 2), own, max_new_tokens=12, ignore_eos=True)
            assert len(found) - found.count(None) == 5 * 11, own


@pytest.mark.parametrize("family", ["t5", "gpt2"])
@pytest.mark.parametrize("sampled", SAMPLED, ids=["greedy", "sampled", "by-rules"])
def test_nobody_waits_for_the_prefill_of_newcomers(
    monkeypatch: pytest.MonkeyPatch, folder: Path, sampled: dict[str, Any], family: str
) -> None:
    """Nor of their encoder. Their first tokens are drawn among those of rows that run, in steps
    that were begun ahead; but for a decoder's that is alone."""
    waited: list[Row] = []

    def noted(logits: Tensor, rows: Any) -> Any:
        waited.extend(rows)
        return draw_by_row(logits, rows)

    draw_by_row = executor.draw_by_row
    monkeypatch.setattr(executor, "draw_by_row", noted)
    own, options = prompts(5, 7), {"max_new_tokens": 30, "ignore_eos": True} | sampled
    with cpu_model(folder, family) as cpu, open_model(folder, family) as model:
        expected = [cpu.generate([p], options)[0].token_ids for p in own]
        _, _, jobs = model._jobs(own, None, options)
        first, *others = [answer for job in jobs for answer in job.answers]
        model.engine.submit([first])
        while len(first.generated) < 3:
            model.engine.step()
        assert len(waited) == (family == "gpt2")
        model.engine.submit(others)
        while any(answer.finish_reason is None for answer in (first, *others)):
            model.engine.step()
        assert len(waited) == (family == "gpt2")
        assert [answer.generated for answer in (first, *others)] == expected


@pytest.mark.parametrize("family", ["t5", "gpt2"])
@pytest.mark.parametrize("sampled", SAMPLED, ids=["greedy", "sampled", "by-rules"])
def test_known_tokens_are_a_step_that_nobody_waits_for(
    monkeypatch: pytest.MonkeyPatch, folder: Path, sampled: dict[str, Any], family: str
) -> None:
    """An encoder-decoder's start tokens, and prompts of one token: the next step has begun when
    what they drew is read. Some answers end there, and leave the step behind without their rows."""
    events: list[str] = []
    for owner, name in ((ahead.Ahead, "_replay"), (ahead.Flight, "results")):
        method = getattr(owner, name)

        def noted(*given: Any, method: Any = method, name: str = name) -> Any:
            events.append(name)
            return method(*given)

        monkeypatch.setattr(owner, name, noted)
    monkeypatch.setattr(executor.CudaExecutor, "_draw", None)  # never called
    own = prompts(5, 7) if family == "t5" else [[3 + i] for i in range(5)]
    lengths = [{"max_new_tokens": n, "ignore_eos": True} | sampled for n in (4, 1, 3, 1, 4)]
    with cpu_model(folder, family) as cpu, open_model(folder, family) as model:
        for options in ([lengths[0]] * 5, lengths):
            events.clear()
            expected = [c.token_ids for c in cpu.generate(own, options)]
            assert [c.token_ids for c in model.generate(own, options)] == expected
            assert events == ["_replay"] + ["_replay", "results"] * 3 + ["results"]


def test_random_numbers_are_of_the_rows_that_go_on(folder: Path) -> None:
    """They are made for several steps at once; rows end, and others come, between these."""
    own, steps = prompts(4, 6), ahead.DRAWN_AT_ONCE
    sampled: dict[str, Any] = {"do_sample": True, "top_p": 0.9, "ignore_eos": True}
    lengths = [2 * steps + 3, steps, 3, 3 * steps]
    options = [
        sampled | {"max_new_tokens": n, "seed": n, "num_return_sequences": 2} for n in lengths
    ]
    with cpu_model(folder, "t5") as cpu, open_model(folder, "t5") as model:
        expected = [answer.token_ids for answer in cpu.generate(own, options)]
        assert [answer.token_ids for answer in model.generate(own, options)] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_searches_go_on_inside_graphs(
    monkeypatch: pytest.MonkeyPatch, folder: Path, family: str
) -> None:
    """Alone, beside their like, and, outside of graphs, beside rows of other kinds."""
    of, kinds = beams.BeamKind.of, []
    monkeypatch.setattr(beams.BeamKind, "of", lambda rows: kinds.append(of(rows)) or kinds[-1])
    own, size = prompts(3, 11), {"max_new_tokens": 9}
    with cpu_model(folder, family) as cpu, open_model(folder, family) as model:
        for options in SEARCHES:
            expected = cpu.generate(own, size | options)
            found = model.generate(own, size | options)
            assert [c.token_ids for c in found] == [c.token_ids for c in expected]
            assert [c.score for c in found] == pytest.approx([c.score for c in expected], abs=2e-5)
        groups = {(o["num_beams"] // o.get("num_beam_groups", 1)) for o in SEARCHES}
        assert {kind.width for kind in kinds if kind} >= groups
        kinds.clear()
        mixed = [size | o for o in (SEARCHES[0], {}, SEARCHES[1])]
        expected = [cpu.generate([p], o) for p, o in zip(own, mixed, strict=True)]
        tokens = [c.token_ids for answers in expected for c in answers]
        assert [c.token_ids for c in model.generate(own, mixed)] == tokens
        assert None in kinds
        assert tiny_models.is_clean(model)


def test_what_a_graph_finds_for_searches_is_what_the_reference_finds() -> None:
    """Padding after them, a NaN and tokens that cannot come among them."""
    logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[4, 7], logits[0, 9:], logits[7] = float("nan"), float("-inf"), float("nan")
    scores = ((-1.0, -0.5, -2.0), (-3.0, -0.25, -0.5))
    rows = [
        Row([5], 0, [1], 1, sample=SampleRow(), beams=Beams(own, 20) if i == 0 else None)
        for own in scores
        for i in range(3)
    ]
    kind = beams.BeamKind.of(rows)
    assert kind == (3, 20)
    given = beams.BeamInputs(inputs.StepInputs(LIMITS, 8, False, torch.device("cpu")))
    given.fill(rows, kind)
    found = kind.results(given.best(logits, kind), VOCAB)
    expected = draw(logits[:6], rows)
    assert found[0] == expected[0]
    assert found[0].finite and not found[1].finite
    assert beams.BeamKind.of(rows[1:]) is None
    assert beams.BeamKind.of(rows[:5]) is None
    assert beams.BeamKind.of([*rows, rows[0]._replace(beams=None)]) is None
    changed: list[dict[str, Any]] = [
        {"banned": (3,)},
        {"logprobs": 1},
        {"rules": Rules(bad_words=((3,),)), "history": History([5], 1)},
        {"forced": (3,)},
    ]
    for other in (SampleRow(**change) for change in changed):
        assert beams.BeamKind.of([*rows[:5], rows[5]._replace(sample=other)]) is None


def test_answers_up_to_the_last_position(folder: Path) -> None:
    own = [tokens[:4] for tokens in prompts(3, 7)]
    longest = {"max_new_tokens": LIMITS.max_tokens - 4, "ignore_eos": True}
    own = [(tokens * 4)[:4] for tokens in own]
    with cpu_model(folder, "gpt2") as cpu, open_model(folder, "gpt2") as model:
        expected = [c.token_ids for c in cpu.generate(own, longest)]
        assert [c.token_ids for c in model.generate(own, longest)] == expected


def test_a_step_that_fails_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """At every place where a step can be interrupted, the next answers are right."""
    own = prompts(4, 5)
    with cpu_model(folder, "gpt2") as cpu, open_model(folder, "gpt2") as model:
        expected = [c.token_ids for c in cpu.generate(own, max_new_tokens=9)]
        for name, number in itertools.product(
            ("_prepare", "_draw", "_next_logits", "_go_on"), range(1, 4)
        ):
            calls = itertools.count(1)
            method = getattr(executor.CudaExecutor, name)

            def failing(
                *given: Any, method: Any = method, calls: Any = calls, number: int = number
            ) -> Any:
                if next(calls) == number:
                    raise RuntimeError("broken")
                return method(*given)

            with monkeypatch.context() as patched:
                patched.setattr(executor.CudaExecutor, name, failing)
                try:
                    model.generate(own, max_new_tokens=9)
                except RuntimeError as error:
                    assert str(error) == "broken"
            assert [c.token_ids for c in model.generate(own, max_new_tokens=9)] == expected
            assert tiny_models.is_clean(model)


@pytest.mark.parametrize("name", ["capture", "run"])
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_without_memory_for_graphs_it_runs_uncaptured(
    monkeypatch: pytest.MonkeyPatch, folder: Path, family: str, name: str
) -> None:
    """Nor for the steps that are tried when it is loaded."""
    own = prompts(4, 6)
    with cpu_model(folder, family) as cpu:
        expected = [c.token_ids for c in cpu.generate(own, max_new_tokens=9)]

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(capturing, name, no_room)
    with open_model(folder, family) as model:
        opened: Any = model.engine.executor
        assert opened._fed is not None
        assert [c.token_ids for c in model.generate(own, max_new_tokens=9)] == expected


def test_a_gpu_that_refuses_the_step_kernel_runs_others(
    monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Tensor) -> None:
        raise RuntimeError("launch: too many blocks in cooperative launch\nmore")

    monkeypatch.setattr(torch.ops.lmi_multi, "run_program", refuse)
    assert_same_as_cpu(folder, "t5", open_model(folder, "t5"))
    assert "kernel by kernel: launch: too many blocks in cooperative launch" in caplog.text
