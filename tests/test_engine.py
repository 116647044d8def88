"""The engine over the real CPU executor: batches, slices, failures, interrupts and threads."""

from __future__ import annotations

import inspect
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest
import torch

from lmi_multi.engine.scheduler import Scheduler
from lmi_multi.engine.sequence import Sequence
from lmi_multi.errors import OptionError
from lmi_multi.model import Model
from tests.families import VOCAB
from tests.tiny_models import Watched, artifact, executor, free_blocks, is_clean, model

SHAPES = ["gpt2", "llama-mqa-biased-tied", "mistral-window", "t5"]
Request = tuple[list[int], dict[str, Any]]


def requests(count: int, seed: int = 0, longest: int = 30) -> list[Request]:
    """Ragged prompts with options of every kind; all of them are reproducible."""
    random = Random(seed)
    made: list[Request] = []
    for number in range(count):
        ids = [random.randrange(3, VOCAB) for _ in range(random.randint(1, longest))]
        options: dict[str, Any] = {"max_new_tokens": random.randint(1, 30)}
        if number % 3:
            options |= {"do_sample": True, "seed": number, "temperature": random.choice([0.3, 2.0])}
            options |= random.choice([{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 0}])
        options |= random.choice([{}, {"ignore_eos": True}, {"min_new_tokens": 1}])
        made.append((ids, options))
    return made


def generate(opened: Model, made: list[Request]) -> list[list[int]]:
    completions = opened.generate([ids for ids, _ in made], [options for _, options in made])
    assert [c.prompt for c in completions] == [ids for ids, _ in made]
    return [c.token_ids for c in completions]


def sequences(opened: Model, made: list[Request]) -> list[Sequence]:
    """What the engine gets for requests that have one answer each."""
    *_, jobs = opened._jobs([ids for ids, _ in made], [o for _, o in made], {})
    return [job.answers[0] for job in jobs]


@pytest.fixture(params=SHAPES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


# --- what a row's neighbours must not change


def test_batch_invariance(family: str, checkpoints: Path) -> None:
    made = requests(40)
    with model(artifact(checkpoints, family), max_batch=7) as opened:
        alone = [generate(opened, [request])[0] for request in made]
        together = generate(opened, made)
        assert together == alone
        assert generate(opened, made[::-1]) == alone[::-1]
        assert is_clean(opened)
    assert len({tuple(tokens) for tokens in alone}) > 35


@pytest.mark.parametrize("max_step_tokens", [1, 5, 16])
def test_prefill_in_slices(family: str, checkpoints: Path, max_step_tokens: int) -> None:
    made = requests(6, seed=1)
    built = artifact(checkpoints, family)
    with model(built) as whole:
        expected = generate(whole, made)
    watched = Watched(executor(built, max_step_tokens=max_step_tokens))
    with model(built, watched) as sliced:
        assert generate(sliced, made) == expected
    counts = [sum(len(row.token_ids) for row in batch.rows) for batch in watched.batches]
    assert max(counts) <= max_step_tokens


def test_a_small_cache_queues(checkpoints: Path) -> None:
    made = requests(8, seed=2)
    built = artifact(checkpoints, "t5")
    with model(built) as large, model(built, blocks=16) as small:
        assert generate(small, made) == generate(large, made)
        assert is_clean(small)


# --- continuous batching


def test_a_finished_row_is_replaced_at_the_next_step(checkpoints: Path) -> None:
    built = artifact(checkpoints, "gpt2")
    watched = Watched(executor(built, max_batch=2))
    lengths = [2, 6, 3, 1]
    options = [{"max_new_tokens": n, "ignore_eos": True} for n in lengths]
    with model(built, watched) as opened:
        completions = opened.generate([[9], [8], [7], [6]], options)
    assert [len(c.token_ids) for c in completions] == lengths
    assert [len(batch.rows) for batch in watched.batches] == [2] * 6


def test_results_come_in_the_order_given(checkpoints: Path) -> None:
    options = [{"max_new_tokens": n, "ignore_eos": True} for n in (9, 1, 5, 3, 7, 2)]
    with model(artifact(checkpoints, "gpt2"), max_batch=2) as opened:
        completions = opened.generate([[10 + i] for i in range(6)], options)
    assert [c.prompt for c in completions] == [[10 + i] for i in range(6)]
    assert [len(c.token_ids) for c in completions] == [9, 1, 5, 3, 7, 2]


# --- how a sequence ends


def test_end_tokens(checkpoints: Path) -> None:
    prompt = [7, 8, 9]
    with model(artifact(checkpoints, "gpt2")) as opened:
        sample = {"do_sample": True, "temperature": 3.0, "top_k": 0, "max_new_tokens": 60}
        plain = next(
            c
            for seed in range(50)
            for c in opened.generate([prompt], sample, seed=seed)
            if c.finish_reason == "eos" and len(c.token_ids) > 3
        )
        assert plain.token_ids.index(2) == len(plain.token_ids) - 1
        seed = next(
            seed
            for seed in range(50)
            if opened.generate([prompt], sample, seed=seed)[0].token_ids == plain.token_ids
        )
        [ignored] = opened.generate([prompt], sample, seed=seed, ignore_eos=True)
        assert ignored.finish_reason == "length" and len(ignored.token_ids) == 60
        assert ignored.token_ids[: len(plain.token_ids)] == plain.token_ids
        least = len(plain.token_ids) + 2
        [longer] = opened.generate([prompt], sample, seed=seed, min_new_tokens=least)
        assert len(longer.token_ids) >= least and 2 not in longer.token_ids[:least]


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_stop_strings(family: str, checkpoints: Path) -> None:
    with model(artifact(checkpoints, family, tokenizer=True)) as opened:
        sample = {"do_sample": True, "seed": 4, "max_new_tokens": 40, "ignore_eos": True}
        [plain] = opened.generate("hello", sample)
        assert plain.text and plain.finish_reason == "length"
        stop = plain.text[3:6]
        cut, free = opened.generate(["hello", "hello"], [{"stop": [stop]}, {}], **sample)
        assert cut.finish_reason == "stop" and cut.text == plain.text[: plain.text.index(stop)]
        assert cut.token_ids == plain.token_ids[: len(cut.token_ids)]
        assert len(cut.token_ids) < 40
        assert (free.text, free.token_ids) == (plain.text, plain.token_ids)


# --- failures


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


# --- threads


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_share_the_steps(family: str, threads: int, checkpoints: Path) -> None:
    built = artifact(checkpoints, family)
    watched = Watched(executor(built))
    shares = [requests(6, seed=10 + t) for t in range(threads)]
    results: dict[int, list[list[int]]] = {}
    with model(built) as plain, model(built, watched) as opened:
        ready = threading.Barrier(threads)

        def work(number: int) -> None:
            ready.wait()
            results[number] = generate(opened, shares[number])

        workers = [threading.Thread(target=work, args=(t,)) for t in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
        assert is_clean(opened)
        expected = {t: generate(plain, share) for t, share in enumerate(shares)}
    assert results == expected


class Gate:
    """Lets an executor's steps through one by one."""

    def __init__(self) -> None:
        self.steps = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def __call__(self, number: int) -> None:
        self.entered.release()
        assert self.steps.acquire(timeout=60)


@pytest.fixture
def gated(checkpoints: Path) -> Iterator[tuple[Model, Gate]]:
    """A GPT-2 whose steps wait for the test, while a thread generates eight tokens."""
    built, gate = artifact(checkpoints, "gpt2"), Gate()
    opened = model(built, Watched(executor(built), gate))
    yield opened, gate
    opened.close()


def start(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Run `work` in a thread; its result or error is appended to the list."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def test_a_finished_caller_leaves_while_another_drives(gated: tuple[Model, Gate]) -> None:
    opened, gate = gated
    long = start(lambda: opened.generate([[5]], max_new_tokens=8, ignore_eos=True))
    assert gate.entered.acquire(timeout=60)  # the first caller drives, and is in its first step
    short = start(lambda: opened.generate([[6]], max_new_tokens=2, ignore_eos=True))
    deadline = time.monotonic() + 60
    while not opened._engine.scheduler.waiting and time.monotonic() < deadline:
        time.sleep(0.001)
    gate.steps.release(3)  # the short one takes part in the second and third step
    short[0].join(60)
    assert [len(c.token_ids) for c in short[1][0]] == [2]
    assert not long[1]
    gate.steps.release(5)
    long[0].join(60)
    assert len(long[1][0][0].token_ids) == 8
    assert is_clean(opened)


def test_a_caller_gives_up_while_another_drives(gated: tuple[Model, Gate]) -> None:
    opened, gate = gated
    [leaving] = sequences(opened, [([6], {"max_new_tokens": 6, "ignore_eos": True})])
    steps = opened._engine.steps([leaving])
    gate.steps.release(1)
    next(steps)
    assert gate.entered.acquire(timeout=60)
    long = start(lambda: opened.generate([[5]], max_new_tokens=8, ignore_eos=True))
    assert gate.entered.acquire(timeout=60)  # in a step that carries both
    held = free_blocks(opened)
    steps.close()  # does not wait for the step
    assert free_blocks(opened) > held
    gate.steps.release(8)
    long[0].join(60)
    assert len(long[1][0][0].token_ids) == 8
    assert leaving.finish_reason == "cancelled" and len(leaving.generated) == 1
    assert is_clean(opened)


def test_close_waits_for_the_step_and_ends_the_waiting(gated: tuple[Model, Gate]) -> None:
    opened, gate = gated
    first = start(lambda: opened.generate([[5]], max_new_tokens=8, ignore_eos=True))
    assert gate.entered.acquire(timeout=60)
    second = start(lambda: opened.encode([[5]]))
    closing = start(opened.close)
    time.sleep(0.05)
    assert closing[0].is_alive()
    gate.steps.release(8)
    for thread, _ in (first, second, closing):
        thread.join(60)
        assert not thread.is_alive()
    assert closing[1] == [None]
    errors = [r for r in (first[1][0], second[1][0]) if isinstance(r, Exception)]
    assert all(isinstance(e, OptionError) and "closed" in str(e) for e in errors)
    assert opened._engine.scheduler.idle


def test_the_cache_starts_clean(checkpoints: Path) -> None:
    opened = executor(artifact(checkpoints, "gpt2"))
    assert all(torch.count_nonzero(pool) == 0 for pool in opened._cache.k + opened._cache.v)
