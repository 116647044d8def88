"""The engine over the real CPU executor: batches, slices, how sequences end, and threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

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
