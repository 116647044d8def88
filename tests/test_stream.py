"""Streams: whole characters, the same text as generate, and places that are freed early."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import ByT5Tokenizer

import lmi_multi
from lmi_multi.model import Model
from lmi_multi.streaming import Chunk
from tests.families import Tiny, _gpt, _t5

PROMPTS = ["one", "a longer prompt", "two"]
FAMILIES = {
    "gpt2": Tiny("GPT2LMHeadModel", "GPT2Config", _gpt()),
    "t5": Tiny("T5ForConditionalGeneration", "T5Config", _t5()),
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    """A random byte-level model: its text is mostly invalid UTF-8."""
    folder = tmp_path_factory.mktemp("stream") / request.param
    FAMILIES[request.param].save(folder, vocab=259)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    with lmi_multi.load(folder, backend="cpu", dtype="fp32", max_batch=2, max_tokens=100) as loaded:
        yield loaded


def gather(chunks: list[Chunk], index: int) -> tuple[str, list[int], str | None]:
    own = [chunk for chunk in chunks if chunk.index == index]
    assert [c.finish_reason for c in own[:-1]] == [None] * (len(own) - 1)
    text = "".join(c.text or "" for c in own)
    return text, [t for c in own for t in c.token_ids], own[-1].finish_reason


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 3, "temperature": 1.5}])
def test_chunks_make_up_the_completions(model: Model, sampling: dict[str, object]) -> None:
    options = {"max_new_tokens": 40, **sampling}
    chunks = list(model.stream(PROMPTS, **options))
    for index, completion in enumerate(model.generate(PROMPTS, **options)):
        text, tokens, finish = gather(chunks, index)
        assert text == completion.text
        assert tokens == completion.token_ids
        assert finish == completion.finish_reason
    assert all("\ufffd" not in (chunk.text or "") for chunk in chunks)


def test_stop_strings_are_never_emitted(model: Model) -> None:
    options = {"do_sample": True, "seed": 5, "max_new_tokens": 80}
    [plain] = model.generate(PROMPTS[0], **options)
    assert plain.text is not None and len(plain.text) > 3
    stop = plain.text[2:4]
    chunks = list(model.stream(PROMPTS[0], stop=stop, **options))
    text, _, finish = gather(chunks, 0)
    assert finish == "stop"
    assert text == plain.text[: plain.text.index(stop)]


def test_closing_frees_the_places(model: Model) -> None:
    scheduler = model._engine.scheduler
    stream = model.stream(PROMPTS, max_new_tokens=60, min_new_tokens=60)
    next(stream)
    assert scheduler.running
    stream.close()
    assert scheduler.idle
    assert scheduler.cache.free == model.limits.blocks


def test_invalid_options_are_refused_before_the_first_chunk(model: Model) -> None:
    with pytest.raises(lmi_multi.LmiError, match="temperature"):
        model.stream("x", temperature=-1)


def test_two_streams_advance_together(model: Model) -> None:
    first = model.stream("one", max_new_tokens=30, min_new_tokens=30)
    second = model.stream("two", max_new_tokens=30, min_new_tokens=30)
    got: dict[int, list[int]] = {0: [], 1: []}
    while len(got[0]) + len(got[1]) < 60:
        for index, stream in enumerate((first, second)):
            chunk = next(stream, None)
            got[index] += chunk.token_ids if chunk else []
    expected = model.generate(["one", "two"], max_new_tokens=30, min_new_tokens=30)
    assert [got[0], got[1]] == [c.token_ids for c in expected]


def test_asyncio_gets_the_same_and_cancellation_frees_the_places(model: Model) -> None:
    async def everything(prompt: str) -> str:
        return "".join([c.text or "" async for c in model.astream(prompt, max_new_tokens=30)])

    async def together() -> list[str]:
        return await asyncio.gather(*map(everything, PROMPTS))

    expected = [c.text for c in model.generate(PROMPTS, max_new_tokens=30)]
    assert asyncio.run(together()) == expected

    async def cancelled() -> None:
        begun = asyncio.Event()

        async def endless() -> None:
            async for _ in model.astream("x", max_new_tokens=90, min_new_tokens=90):
                begun.set()
                await asyncio.sleep(0)

        task = asyncio.create_task(endless())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert model._engine.scheduler.idle


def test_without_a_tokenizer_chunks_have_no_text(tmp_path: Path) -> None:
    FAMILIES["gpt2"].save(tmp_path / "gpt2")
    with lmi_multi.load(tmp_path / "gpt2", backend="cpu", max_tokens=64) as bare:
        chunks = list(bare.stream([[5, 6, 7]], max_new_tokens=4))
    assert all(chunk.text is None for chunk in chunks)
    assert sum(len(chunk.token_ids) for chunk in chunks) <= 4
