"""Beam searches begun ahead of the host, with all that needs a GPU stood in for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lmi_multi.backends.cuda import executor, searches
from lmi_multi.backends.cuda.beams import Gone
from lmi_multi.backends.cuda.ops import Scratch
from lmi_multi.backends.cuda.searches import Place, Searches

from lmi_multi.checkpoint.convert import convert
from lmi_multi.engine.batch import Row
from lmi_multi.model import Model
from lmi_multi.ops.beams import Beams, Going
from lmi_multi.ops.sampling import SampleRow
from lmi_multi.parallel.collectives import SingleRank
from tests import tiny_models
from tests.cuda_stand_ins import stand_in
from tests.families import FAMILIES
from tests.test_cuda_graphs import LIMITS, SEARCHES, cpu_model, prompts

BEAMS: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 20}


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of every step with searches how many there were, and how many had been begun before."""
    taken, noted = Searches.taken, []

    def watched(self: Searches, rows: Sequence[Row]) -> dict[int, Place]:
        found = taken(self, rows)
        if firsts := searches._searched(rows):
            noted.append((len(firsts), len(found)))
        return found

    monkeypatch.setattr(Searches, "taken", watched)
    return noted


def open_model(folder: Path, family: str, **limits: int) -> Model:
    artifact = tiny_models.artifact(folder, family)
    scratch, changed = Scratch(torch.device("cpu")), replace(LIMITS, **limits)
    tensors = artifact.load_rank(0, 1)
    opened = executor.CudaExecutor(artifact.spec, tensors, changed, scratch, SingleRank())
    return Model(artifact, "cuda", opened)


def answers(model: Model, own: list[list[int]], options: Any) -> list[tuple[list[int], Any]]:
    found = model.generate(own, options)
    scores = [pytest.approx(c.score, abs=2e-5) if c.score is not None else None for c in found]
    return list(zip([c.token_ids for c in found], scores, strict=True))


@pytest.mark.parametrize("family", ["t5", "llama-gqa", "bloom", "mistral-window"])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_every_step_but_the_first_is_begun_ahead(
    folder: Path, family: str, size: int, steps: list[tuple[int, int]]
) -> None:
    """And that says where all beams have their blocks, and what was copied."""
    own = prompts(4, 2)
    options = BEAMS | {"ignore_eos": True}
    limits = {"block_size": size, "blocks": 1600 // size}
    with cpu_model(folder, family) as cpu, open_model(folder, family, **limits) as model:
        assert answers(model, own, options) == answers(cpu, own, options)
        assert steps == [(4, 0), *[(4, 4)] * 18]
        assert tiny_models.is_clean(model)


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_a_search_that_ends_leaves_others_running(
    folder: Path, family: str, steps: list[tuple[int, int]]
) -> None:
    """Ahead of the host, until they fit a smaller graph: then they wait for the host once."""
    with cpu_model(folder, family) as cpu, open_model(folder, family) as model:
        ended = 0
        for seed in range(6):
            own = prompts(4, 20 + seed)
            plain = cpu.generate(own, BEAMS | {"max_new_tokens": 20, "ignore_eos": True})
            seen = [c.token_ids[5 + i] for i, c in enumerate(plain)]
            stops = {"stop_token_ids": sorted(set(seen))[:7], "early_stopping": True}
            options = BEAMS | stops | {"max_new_tokens": 40}
            expected = answers(cpu, own, options)
            steps.clear()
            assert answers(model, own, options) == expected
            counts = [count for count, _ in steps]
            smaller = {n for n in (1, 2) if n in counts}  # of rows 12 and 9, of 6, and of 3
            late = [count for count, taken in steps if taken < count]
            assert set(late[1:]) <= smaller and len(late) == len(set(late))
            ended += counts[0] == 4 and 3 in counts
        assert ended
        assert tiny_models.is_clean(model)


@pytest.mark.parametrize("options", SEARCHES, ids=str)
def test_searches_end_and_begin_beside_each_other(
    folder: Path, options: dict[str, Any], steps: list[tuple[int, int]]
) -> None:
    """More than there is room for at once, beside rows of other kinds."""
    own = prompts(9, 5)
    each = [{"max_new_tokens": 5 + 3 * i, **options} for i in range(9)]
    each[3], each[7] = {"max_new_tokens": 12}, {"max_new_tokens": 15, "do_sample": True, "seed": 2}
    with cpu_model(folder, "gpt2") as cpu, open_model(folder, "gpt2") as model:
        for _ in range(2):
            assert answers(model, own, each) == answers(cpu, own, each)
        assert tiny_models.is_clean(model)
    begun = sum(taken for _, taken in steps)
    # Groups wait for each other's tokens; and there are more stop tokens than the kernel looks for.
    assert begun == 0 if {"num_beam_groups", "stop_token_ids"} & set(options) else begun > 9


@pytest.mark.parametrize(
    "options",
    [
        {"stop": ["q"]},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"logprobs": 1},
        {"stop_token_ids": list(range(3, 12))},
    ],
    ids=str,
)
def test_what_depends_on_more_than_scores_waits_for_the_host(
    folder: Path, options: dict[str, Any], steps: list[tuple[int, int]]
) -> None:
    artifact = tiny_models.artifact(folder, "t5", tokenizer=True)
    scratch, tensors = Scratch(torch.device("cpu")), artifact.load_rank(0, 1)
    opened = executor.CudaExecutor(artifact.spec, tensors, LIMITS, scratch, SingleRank())
    own, given = ["one", "another"], BEAMS | options
    with (
        tiny_models.model(artifact, max_batch=8) as cpu,
        Model(artifact, "cuda", opened) as model,
    ):
        expected = [c.token_ids for c in cpu.generate(own, given)]
        assert [c.token_ids for c in model.generate(own, given)] == expected
    assert len(steps) > 1 and not any(taken for _, taken in steps)


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("where", ["_prepare", "_draw", "go_on", "result"])
def test_a_step_that_fails_is_taken_again(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    steps: list[tuple[int, int]],
    where: str,
    size: int,
) -> None:
    """At every step memory is short for one of two searches once. The other one takes the step
    again, of which the next has been begun; it is not computed again, and the answers are as they
    should be."""
    own = prompts(2, 8)
    options = BEAMS | {"ignore_eos": True}
    limits = {"block_size": size, "blocks": 1600 // size}
    with cpu_model(folder, "gpt2") as cpu:
        expected = answers(cpu, own[:1], options)
    for number in range(1, 20):
        calls = itertools.count(1)

        def failing(*given: Any, work: Any, calls: Any = calls, number: int = number) -> Any:
            fails = next(calls) == number
            found = work(*given) if where == "go_on" or not fails else None
            if fails:
                raise torch.OutOfMemoryError("no room")
            return found

        of: Any = {"go_on": Searches, "result": Place}.get(where, executor.CudaExecutor)
        method = getattr(of, where)
        with monkeypatch.context() as patched, open_model(folder, "gpt2", **limits) as model:
            made: Any = lambda *given, m=method, f=failing: f(*given, work=m)  # noqa: E731
            if where == "result":
                made = property(lambda self, m=method, f=failing: f(self, work=m.fget))
            patched.setattr(of, where, made)
            steps.clear()
            found = model.generate(own, options)
            assert tiny_models.is_clean(model)
        failed = next(calls) > number  # there are so many
        assert failed or number > (2 if where == "_draw" else 17)
        reason = "out_of_memory" if failed else "length"
        assert [c.finish_reason for c in found[3:]] == [reason] * 3
        if failed:  # the first two times, if it is before anything is begun, nothing was
            begun = next(taken for count, taken in steps if count == 1)
            assert begun == (number > 2 or where in ("go_on", "result"))
        assert [c.token_ids for c in found[:3]] == [tokens for tokens, _ in expected]
        assert [c.score for c in found[:3]] == [score for _, score in expected]


def test_a_search_takes_no_one_elses_step(
    folder: Path, steps: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same prompt again after a stream was left: in the same blocks, by the same scores."""
    own, options = prompts(1, 4), BEAMS | {"ignore_eos": True}
    with cpu_model(folder, "gpt2") as cpu, open_model(folder, "gpt2") as model:
        expected = answers(cpu, own, options)
        for left in range(1, 6):
            go_on, calls = Searches.go_on, itertools.count()

            def interrupt(
                self: Searches, rows: Sequence[Row], taken: Mapping[int, Place],
                go_on: Any = go_on, calls: Any = calls, left: int = left,
            ) -> None:  # fmt: skip
                go_on(self, rows, taken)
                if next(calls) == left:
                    raise KeyboardInterrupt

            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(Searches, "go_on", interrupt)
                model.generate(own, options)
            assert tiny_models.is_clean(model)
            steps.clear()
            assert answers(model, own, options) == expected
            assert steps == [(1, 0), *[(1, 1)] * 18]


GROUPS = {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}


@pytest.mark.parametrize("more", [{}, GROUPS], ids=["going on", "groups"])
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_step_whose_blocks_were_another_s_since_is_not_taken(
    folder: Path, family: str, more: dict[str, Any]
) -> None:
    """A caller leaves behind the first step of a search, another request has its blocks, and the
    search is asked for again: by the same rows, but their keys and values are gone."""
    own, other = [[17, 4, 9, 22, 31]], [[9, 12, 7]]
    options = BEAMS | {"ignore_eos": True} | more
    greedy = {"max_new_tokens": 40, "ignore_eos": True}
    with cpu_model(folder, family) as cpu, open_model(folder, family) as model:
        expected = answers(cpu, own, options)
        _, _, jobs = model._jobs(own, None, options)
        requests = [request for job in jobs for request in job.requests]
        model._engine.submit(requests)
        for _ in range(2):
            model._engine.step()
        model._engine.drop(requests)
        assert tiny_models.is_clean(model)
        assert answers(model, other, greedy) == answers(cpu, other, greedy)
        assert answers(model, own, options) == expected


def test_an_ended_search_leaves_no_step(folder: Path) -> None:
    """The same without anybody who leaves."""
    own, options = [[17, 4, 9, 22, 31]], GROUPS | {"ignore_eos": True}
    with cpu_model(folder, "gpt2") as cpu, open_model(folder, "gpt2") as model:
        for prompt, one in (
            (own, options | {"max_new_tokens": 2}),
            ([[9, 12, 7]], {"max_new_tokens": 40, "ignore_eos": True}),
            (own, options | {"max_new_tokens": 20}),
        ):
            assert answers(model, prompt, one) == answers(cpu, prompt, one)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("number", "which"), [(2, 0), (3, 1), (4, 0), (6, 1), (8, 2), (8, 3)])
def test_a_newcomer_s_blocks_are_nobody_s_copies(
    folder: Path, number: int, which: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four searches. A step is interrupted when the one behind it has begun, one search goes, and
    a newcomer, who waits for its blocks, gets them."""
    own, other = [[17 + i, 4, 9, 22, 31 + i] for i in range(4)], [[9 + i % 40 for i in range(34)]]
    options = BEAMS | {"ignore_eos": True, "max_new_tokens": 30}
    greedy = {"max_new_tokens": 20, "ignore_eos": True}
    limits = {"max_batch": 16, "max_tokens": 64, "block_size": size}
    blocks = 4 * 3 * -(-(5 + 29) // size)

    def made(model: Any, prompts: list[list[int]], one: dict[str, Any]) -> Any:
        jobs = model._jobs(prompts, None, one)[2]
        return jobs, [request for job in jobs for request in job.requests]

    with (
        cpu_model(folder, "gpt2") as cpu,
        open_model(folder, "gpt2", blocks=blocks, **limits) as model,
    ):
        (jobs, searches), (late, newcomer) = made(model, own, options), made(model, other, greedy)
        engine, go_on = model._engine, Searches.go_on
        engine.submit(searches)
        for _ in range(1 + number):
            engine.step()

        def interrupt(self: Searches, rows: Sequence[Row], taken: Mapping[int, Place]) -> None:
            go_on(self, rows, taken)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Searches, "go_on", interrupt)
            engine.step()
        engine.drop([searches.pop(which)])
        engine.submit(newcomer)
        while any(request.finish_reason is None for request in (*searches, *newcomer)):
            engine.step()
        engine.drop([*searches, *newcomer])
        del jobs[which], own[which]
        for found, prompts, one in ((late, other, greedy), (jobs, own, options)):
            tokens = [answer.generated for job in found for answer in job.answers]
            assert tokens == [c.token_ids for c in cpu.generate(prompts, one)]


@pytest.mark.parametrize(("vocab", "beams"), [(8, 12), (5, 12)])
def test_fewer_beams_than_asked_for(tmp_path: Path, vocab: int, beams: int) -> None:
    """So few tokens that a first step has fewer continuations."""
    FAMILIES["gpt2"].save(tmp_path / "source", vocab=vocab)
    artifact = convert(tmp_path / "source", tmp_path / "artifact", dtype="fp32")
    options = {"num_beams": beams, "max_new_tokens": 12, "ignore_eos": True}
    scratch, single = Scratch(torch.device("cpu")), SingleRank()
    tensors = artifact.load_rank(0, 1)
    opened = executor.CudaExecutor(artifact.spec, tensors, LIMITS, scratch, single)
    with (
        tiny_models.model(artifact, **vars(LIMITS)) as cpu,
        Model(artifact, "cuda", opened) as model,
    ):
        assert answers(model, [[3, 4, 2]], options) == answers(cpu, [[3, 4, 2]], options)


def test_only_what_the_device_has_done_is_taken() -> None:
    sample = SampleRow(step=4)
    going = Going((2,), ((1, 3), (1, 4)), sample)
    before = [
        Row([5], 8, [1, 3], 3, sample=SampleRow(step=3), beams=Beams((-1.0, -2.0), 4, going)),
        Row([6], 8, [1, 4], 3, sample=SampleRow(step=3)),
    ]
    gone = Gone([1, 1], [7, 8], (-3.0, -4.0), [3, 4], [4, -1])
    rows = [
        Row([7], 9, [1, 3], 3, sample=sample, beams=Beams((-3.0, -4.0), 4), copies=[(4, 3)]),
        Row([8], 9, [1, 4], 3, sample=sample),
    ]
    assert gone.led_to(rows, before, 8)
    others: list[tuple[int, dict[str, Any]]] = [
        (0, {"token_ids": [9]}), (1, {"start": 8}), (1, {"blocks": [1, 5]}),
        (1, {"start": 7, "blocks": [1]}),
        (1, {"blocks": [2, 4]}), (0, {"copies": []}), (0, {"copies": [(3, 4)]}),
        (1, {"sample": SampleRow(step=5)}), (0, {"beams": None}), (1, {"cross_blocks": [9]}),
        (0, {"beams": Beams((-3.0, -4.5), 4)}), (0, {"beams": Beams((-3.0, -4.0), 5)}),
        (0, {"beams": Beams((-3.0,), 4)}), (0, {"beams": Beams((-3.0, -4.0), 4, search=1)}),
    ]  # fmt: skip
    for number, change in others:
        changed = list(rows)
        changed[number] = rows[number]._replace(**change)
        assert not gone.led_to(changed, before, 8), change
    assert not gone.led_to(rows[:1], before, 8)
    last = [before[0]._replace(beams=Beams((-1.0, -2.0), 4)), before[1]]
    assert not gone.led_to(rows, last, 8)
