"""The engine as steps fail and callers are interrupted or leave: others lose nothing by it."""

from __future__ import annotations

import inspect
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from lmi_multi.engine.scheduler import Scheduler
from lmi_multi.engine.sequence import Sequence
from tests.test_engine import generate, requests, sequences
from tests.tiny_models import Watched, artifact, executor, is_clean, model

BAD = 50  # the token whose embedding is spoiled


@pytest.mark.parametrize("family", ["llama", "t5-gated-untied"])
def test_a_row_with_nan_ends_alone(family: str, checkpoints: Path) -> None:
    built = artifact(checkpoints, family)
    good = [[5, 6, 7], [8] * 21, [9, 10]]
    greedy = {"max_new_tokens": 12, "ignore_eos": True}
    opened = executor(built, blocks=32, max_batch=2)
    with model(built, opened) as healthy:
        expected = [c.token_ids for c in healthy.generate(good, greedy)]
        assert all(BAD not in tokens for tokens in expected)
        opened._network.weights.embed[BAD] = float("nan")
        for bad in ([BAD], [5, BAD, 6] * 10):
            for place in range(3):  # the one behind gets its blocks while another runs
                prompts = [*good[:place], bad, *good[place:]]
                completions = healthy.generate(prompts, greedy)
                sick = completions.pop(place)
                assert sick.finish_reason == "numerical_error" and sick.token_ids == []
                assert sick.error == "logits of generated token 0 hold NaN or infinity"
                assert [c.token_ids for c in completions] == expected
                assert {c.finish_reason for c in completions} == {"length"}
            # Short rows beside longer ones read what their blocks' last owner left.
            healthy.generate([bad, bad], greedy)
            assert [c.token_ids for c in healthy.generate(good, greedy)] == expected
        assert is_clean(healthy)


def failing(at: int, error: BaseException) -> Callable[[int], None]:
    def before(number: int) -> None:
        if number == at:
            raise error

    return before


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 4])
def test_a_failed_step_leaves_nothing_behind(
    family: str, error: BaseException, at: int, checkpoints: Path
) -> None:
    built = artifact(checkpoints, family)
    made = requests(6, seed=5)
    watched = Watched(executor(built), failing(at, error))
    with model(built) as plain, model(built, watched) as opened:
        with pytest.raises(type(error)):
            generate(opened, made)
        assert len(watched.batches) == at and is_clean(opened)
        assert generate(opened, made) == generate(plain, made)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_others_go_on_when_the_driver_fails(family: str, at: int, checkpoints: Path) -> None:
    """Both callers' prompts are in the step that fails: whoever drove it gets the error."""
    built = artifact(checkpoints, family)
    made = requests(4, seed=6)
    watched = Watched(executor(built), failing(at, RuntimeError("broken")))
    with model(built) as plain, model(built, watched) as opened:
        expected = generate(plain, made)
        engine = opened._engine
        ours, others = (sequences(opened, part) for part in (made[:2], made[2:]))
        theirs = engine.steps(others)
        for sequence in ours:  # as another thread would have, while it waits
            engine.scheduler.add(sequence)
        with pytest.raises(RuntimeError, match="broken"):
            for _ in theirs:
                pass
        assert all(s.finish_reason != "cancelled" for s in ours)
        engine.run([])
        while any(s.finish_reason is None for s in ours):
            engine._step()
        assert [s.generated for s in ours] == expected[:2]
        assert is_clean(opened)


@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="Python 3.10 acts on signals inside `with` and `finally` too"
)
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_an_interrupt_at_any_moment_leaves_nothing_behind(family: str, checkpoints: Path) -> None:
    """Python acts on a signal where calls begin and end: interrupt at every one of these."""
    made = requests(2, seed=7, longest=4)
    for _, options in made:
        options["max_new_tokens"] = 2
    with model(artifact(checkpoints, family), max_batch=1, block_size=2) as opened:
        expected = generate(opened, made)
        last = interrupted_at(10**9, lambda: generate(opened, made))
        for moment in range(1, last + 1):
            with pytest.raises(KeyboardInterrupt):
                interrupted_at(moment, lambda: generate(opened, made))
            assert is_clean(opened), moment
            assert opened._engine._user is None
        assert generate(opened, made) == expected
    assert last > 100


def interrupted_at(moment: int, work: Callable[[], Any]) -> int:
    """Interrupt `work` where the engine's code begins or ends a call for the `moment`th time.

    Returns how many such moments there were.
    """
    count = 0

    def watch(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        code = frame.f_code
        # No signal is looked at before a call into C, nor where a generator yields.
        if event == "c_call" or (code.co_flags & inspect.CO_GENERATOR and event == "return"):
            return
        # What a generator expression raises as it is dropped is lost.
        if "/lmi_multi/engine/" in code.co_filename and code.co_name != "<genexpr>":
            count += 1
            if count == moment:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("place", ["push", "advance", "release"])
def test_ctrl_c_lets_a_steps_outcome_become_whole(
    family: str, place: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever drives a step is interrupted while others' tokens are noted: they go on as ever."""
    built, made = artifact(checkpoints, family), requests(3, seed=8)
    for _, options in made:
        options["max_new_tokens"] = 6
    owner: Any = Scheduler if place == "release" else Sequence
    real = getattr(owner, place)
    with model(built) as plain, model(built) as opened:
        expected = generate(plain, made)
        engine, others = opened._engine, sequences(opened, made[1:])
        engine.submit(others)
        calls = []

        def pressed(*arguments: Any) -> None:
            calls.append(1)
            if len(calls) == 5:
                signal.raise_signal(signal.SIGINT)
            real(*arguments)

        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(owner, place, pressed)
                with pytest.raises(KeyboardInterrupt):
                    for _ in range(3):  # a release comes only at an end
                        generate(opened, made[:1])
        finally:
            signal.signal(signal.SIGINT, before)
        while any(s.finish_reason is None for s in others):
            engine.step()
        assert [s.generated for s in others] == expected[1:]
        assert is_clean(opened)


def test_a_caller_who_leaves_in_mid_prefill_harms_nobody(checkpoints: Path) -> None:
    """Its prompt's blocks are gone when the step that computed a slice of it is committed."""
    built = artifact(checkpoints, "gpt2")
    leave: list[Callable[[], None]] = []
    opened_executor = executor(built, block_size=4, max_step_tokens=16)
    watched = Watched(opened_executor, lambda _: leave.pop()() if leave else None)
    with model(built, watched) as opened:
        expected = opened.generate([[5, 6, 7]], max_new_tokens=9, ignore_eos=True)
        stream = opened.stream([[9], list(range(20, 70))], max_new_tokens=9, ignore_eos=True)
        next(stream)
        leave.append(stream.close)  # type: ignore[attr-defined]
        found = opened.generate([[5, 6, 7]], max_new_tokens=9, ignore_eos=True)
        assert not leave and [c.token_ids for c in found] == [c.token_ids for c in expected]
        assert is_clean(opened)
