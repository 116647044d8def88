"""`load` and `Model`: what callers may ask, and what each refusal says."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lmi_multi
from lmi_multi.errors import CapacityError, OptionError
from lmi_multi.model import Model, load
from tests.families import VOCAB
from tests.tiny_models import Watched, artifact, checkpoint, executor, is_clean, model


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Token ids in and out: its checkpoint has no tokenizer."""
    with model(artifact(tmp_path_factory.mktemp("gpt2"), "gpt2")) as opened:
        yield opened


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """With a byte tokenizer."""
    with model(artifact(tmp_path_factory.mktemp("t5"), "t5", tokenizer=True)) as opened:
        yield opened


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with model(artifact(tmp_path_factory.mktemp("bert"), "bert")) as opened:
        yield opened


def changed(source: Path, target: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a checkpoint with one of its JSON files changed; None removes the file."""
    shutil.copytree(source, target)
    fields = change(json.loads((target / name).read_text()))
    if fields is None:
        (target / name).unlink()
    else:
        (target / name).write_text(json.dumps(fields))
    return target


# --- prompts


def test_prompt_forms_agree(gpt2: Model) -> None:
    ids = [[5, 6, 7], [8, 9, 10]]
    forms: list[Any] = [ids, (tuple(ids[0]), ids[1]), np.array(ids), torch.tensor(ids)]
    forms.append([torch.tensor(own) for own in ids])
    answers = [gpt2.generate(form, max_new_tokens=6) for form in forms]
    for completions in answers:
        assert [c.prompt_token_ids for c in completions] == ids
        assert [c.token_ids for c in completions] == [c.token_ids for c in answers[0]]
    [single] = gpt2.generate(ids[0], max_new_tokens=6)
    assert single.token_ids == answers[0][0].token_ids


def test_text_prompts(t5: Model) -> None:
    one, two = t5.generate(["hello", "wörld"], max_new_tokens=6)
    assert (one.prompt, two.prompt) == ("hello", "wörld")
    assert t5.tokenizer is not None
    assert two.prompt_token_ids == t5.tokenizer.encode("wörld")
    assert isinstance(one.text, str)
    mixed = t5.generate([two.prompt_token_ids, "hello"], max_new_tokens=6)
    assert [c.token_ids for c in mixed] == [two.token_ids, one.token_ids]
    assert mixed[0].prompt == two.prompt_token_ids


def test_without_a_tokenizer(gpt2: Model) -> None:
    [answer] = gpt2.generate([[5, 6]], max_new_tokens=4)
    assert gpt2.tokenizer is None and answer.text is None and len(answer.token_ids) == 4
    with pytest.raises(OptionError, match="prompt 1 is text, but the model has no tokenizer"):
        gpt2.generate([[5], "text"])
    with pytest.raises(OptionError, match="stop needs a tokenizer"):
        gpt2.generate([[5]], stop="x")


def test_nothing_to_do(gpt2: Model) -> None:
    assert gpt2.generate([]) == []
    assert gpt2.stats.prompts == gpt2.stats.generated_tokens == 0
    assert gpt2.encode([]) == []


def test_empty_prompts(gpt2: Model, t5: Model, checkpoints: Path, tmp_path: Path) -> None:
    [empty, start] = gpt2.generate([[], [1]], max_new_tokens=5)
    assert empty.prompt == [] and empty.prompt_token_ids == [1]
    assert empty.token_ids == start.token_ids
    [text] = t5.generate("", max_new_tokens=3)
    assert text.prompt_token_ids == [1]  # the tokenizer's own end token
    with pytest.raises(OptionError, match="prompt 1 is empty"):
        t5.generate(["a", []])
    source = checkpoint(checkpoints, "gpt2")
    change = changed(
        source, tmp_path / "c", "generation_config.json", lambda f: {**f, "bos_token_id": None}
    )
    with load(change, backend="cpu") as silent, pytest.raises(OptionError, match="0 is empty"):
        silent.generate([[]])


def test_refused_prompts(gpt2: Model, t5: Model) -> None:
    highest = VOCAB - 1
    for prompts, message in [
        ([[5], [VOCAB]], f"prompt 1 holds token id {VOCAB}, must be 0 to {highest}"),
        ([[-1]], f"prompt 0 holds token id -1, must be 0 to {highest}"),
        ([[2**70]], f"prompt 0 holds token id {2**70}, must be 0 to {highest}"),
        ([1.5], "prompt 0 is a float"),
        (None, "prompts is a NoneType"),
        (b"x", "prompts is a bytes"),
    ]:
        with pytest.raises(OptionError, match=message):
            gpt2.generate(prompts)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="prompt 1 is no valid Unicode at character 2"):
        t5.generate(["fine", "ab\ud800"])


# --- lengths and options, refused before anything runs


@pytest.mark.parametrize(
    ("family", "prompts", "options", "message"),
    [
        ("gpt2", [[5], [6] * 65], {}, "prompt 1 has 65 tokens, must be at most 64"),
        ("gpt2", [[5], [6] * 64], {}, "prompt 1: the prompt has 64 tokens; allowed: at most 63"),
        ("gpt2", [[6] * 60], {"max_new_tokens": 5}, "prompt 0: max_new_tokens is 5.*at most 4 new"),
        ("gpt2", [[6] * 9], {"max_length": 9}, "prompt 0: max_length.*allowed: at least 10"),
        ("t5", [[5], [6] * 65], {}, "prompt 1 has 65 tokens, must be at most 64"),
        ("t5", [[6] * 64], {"max_new_tokens": 64}, "max_new_tokens is 64.*at most 63 new"),
        ("gpt2", [[5]], {"max_tokens": 5}, "unknown option 'max_tokens'; did you mean"),
        ("gpt2", [[5]], {"temperature": -1}, "temperature is -1"),
        ("gpt2", [[5], [6]], {"options": [{"top_k": 5}]}, "options has 1 entries for 2 prompts"),
        ("gpt2", [[5], [6]], {"options": [{}, {"top_p": 2}]}, "top_p is 2"),
        ("gpt2", [[5]], {"options": 5}, "options is 5"),
    ],
)
def test_refused_before_anything_runs(
    family: str, prompts: Any, options: dict[str, Any], message: str, checkpoints: Path
) -> None:
    built = artifact(checkpoints, family)
    watched = Watched(executor(built))
    with model(built, watched) as opened:
        with pytest.raises(OptionError, match=message):
            opened.generate(prompts, **options)
        assert not watched.batches and is_clean(opened)


def test_prompts_that_just_fit(gpt2: Model, t5: Model) -> None:
    [full] = gpt2.generate([[6] * 60], max_new_tokens=4, ignore_eos=True)
    [default] = gpt2.generate([[6] * 60], ignore_eos=True)  # cut to what fits
    assert len(full.token_ids) == len(default.token_ids) == 4
    [long] = t5.generate([[6] * 64], max_new_tokens=63, ignore_eos=True)
    assert len(long.token_ids) == 63


def test_options_of_each_prompt(gpt2: Model) -> None:
    prompts = [[5], [5], [5]]
    some: list[Any] = [{"max_new_tokens": 2}, None, lmi_multi.GenerateOptions(max_new_tokens=4)]
    completions = gpt2.generate(prompts, some, ignore_eos=True)
    assert [len(c.token_ids) for c in completions] == [2, 20, 4]
    completions = gpt2.generate(prompts, some, ignore_eos=True, max_new_tokens=3)
    assert [len(c.token_ids) for c in completions] == [3, 3, 3]


def test_stats(gpt2: Model) -> None:
    gpt2.generate([[5], [6]], max_new_tokens=3, ignore_eos=True)
    stats = gpt2.stats
    assert (stats.prompts, stats.generated_tokens) == (2, 6) and stats.seconds > 0
    assert stats.tokens_per_second == pytest.approx(6 / stats.seconds)


# --- what the model's files say


def test_defaults_come_from_generation_config(
    gpt2: Model, checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sample = {"do_sample": True, "temperature": 5.0, "top_k": 0, "seed": 1}
    [plain] = gpt2.generate([[5]], ignore_eos=True, max_new_tokens=40, **sample)
    first, second = sorted(set(plain.token_ids[3:]), key=plain.token_ids.index)[:2]
    folder = changed(
        checkpoint(checkpoints, "gpt2"),
        tmp_path / "c",
        "generation_config.json",
        lambda f: {
            **f,
            "eos_token_id": [second, first],
            "max_new_tokens": 30,
            "do_sample": True,
            "temperature": 5.0,
            "top_k": 0,
            "penalty_alpha": 0.6,
            "watermarking_config": {"bias": 2.0},
        },
    )
    with caplog.at_level(logging.WARNING), load(folder, backend="cpu", dtype="fp32") as opened:
        [ended] = opened.generate([[5]], seed=1)
        [whole] = opened.generate([[5]], seed=1, ignore_eos=True)
        [greedy] = opened.generate([[5]], do_sample=False, max_new_tokens=3, ignore_eos=True)
    assert ended.finish_reason == "eos"
    assert ended.token_ids == plain.token_ids[: plain.token_ids.index(first) + 1]
    assert whole.finish_reason == "length" and whole.token_ids == plain.token_ids[:30]
    [expected] = gpt2.generate([[5]], max_new_tokens=3, ignore_eos=True)
    assert greedy.token_ids == expected.token_ids
    warnings = [record.getMessage() for record in caplog.records if record.name == "lmi_multi"]
    assert len(warnings) == 1
    assert "penalty_alpha=0.6" in warnings[0] and "watermarking_config=" in warnings[0]


def test_an_encoder_decoder_needs_its_start_token(checkpoints: Path, tmp_path: Path) -> None:
    source = checkpoint(checkpoints, "t5")

    def forget(fields: dict[str, Any]) -> dict[str, Any]:
        lost = ("decoder_start_token_id", "bos_token_id")
        return {name: value for name, value in fields.items() if name not in lost}

    without = changed(source, tmp_path / "a", "generation_config.json", forget)
    with load(without, backend="cpu") as opened:
        message = "generation_config.json has no decoder_start_token_id"
        with pytest.raises(OptionError, match=message):
            opened.generate([[5]])
        assert len(opened.encode([[5, 6]])[0].hidden) == 2
    # Without that file, config.json is looked at; bos stands in, as in transformers.
    bare = changed(source, tmp_path / "b", "generation_config.json", lambda fields: None)
    config = changed(bare, tmp_path / "c", "config.json", forget)
    with (
        load(config, backend="cpu") as opened,
        pytest.raises(OptionError, match=r"config\.json has no decoder_start_token_id"),
    ):
        opened.generate([[5]])
    with_bos = changed(
        source, tmp_path / "d", "generation_config.json", lambda f: forget(f) | {"bos_token_id": 0}
    )
    with load(with_bos, backend="cpu") as opened, load(bare, backend="cpu") as plain:
        answers = [m.generate([[5]], max_new_tokens=5)[0].token_ids for m in (opened, plain)]
    assert answers[0] == answers[1]


# --- encoders


def test_bert_encodes_and_does_not_generate(bert: Model) -> None:
    with pytest.raises(OptionError, match="bert is an encoder and generates no text: use encode"):
        bert.generate([[5, 6]])
    whole, short = bert.encode([[5, 6, 7], [8]])
    assert whole.hidden.shape == (3, 48) and short.hidden.shape == (1, 48)
    assert whole.pooled is not None and whole.pooled.shape == (48,)
    torch.testing.assert_close(bert.encode([[8]])[0].hidden, short.hidden)


def test_more_prompts_than_a_step_holds(bert: Model) -> None:
    prompts = [[3 + i % 90] * (1 + i % 40) for i in range(30)]
    together = bert.encode(prompts)
    for prompt, encoded in zip(prompts, together, strict=True):
        torch.testing.assert_close(
            encoded.hidden, bert.encode([prompt])[0].hidden, atol=1e-5, rtol=1e-4
        )


def test_segment_ids(bert: Model, t5: Model) -> None:
    prompt = [5, 6, 7]
    plain, zeros, ones = (
        bert.encode([prompt], segment_ids=segments)[0].hidden
        for segments in (None, [[0, 0, 0]], [[0, 1, 1]])
    )
    torch.testing.assert_close(plain, zeros)
    assert not torch.allclose(plain, ones, atol=1e-3)
    for segments, message in [
        ([[0, 0]], "segment_ids 0 has 2 entries for 3 tokens"),
        ([[0, 1, 2]], "segment_ids 0 must be 0 to 1"),
        ([[0, -1, 0]], "segment_ids 0 must be 0 to 1"),
        ([], "0 segment_ids for 1 prompts"),
    ]:
        with pytest.raises(OptionError, match=message):
            bert.encode([prompt], segment_ids=segments)
    with pytest.raises(OptionError, match="t5 has no segments"):
        t5.encode([prompt], segment_ids=[[0, 0, 0]])


# --- load and close


def test_after_close(checkpoints: Path) -> None:
    with load(checkpoint(checkpoints, "t5"), backend="cpu") as opened:
        opened.generate([[5]], max_new_tokens=2)
    opened.close()
    for use in (opened.generate, opened.encode, opened.stream, opened.embed):
        with pytest.raises(OptionError, match="the model is closed"):
            use([[5]])


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"backend": "tpu"}, OptionError, "backend is 'tpu', must be auto, cuda, neuron, cpu"),
        ({"dtype": "fp8"}, OptionError, "dtype is 'fp8'"),
        ({"quantize": "int4"}, OptionError, "quantize is 'int4'"),
        ({"max_batch": 0}, OptionError, "max_batch is 0, must be an integer, at least 1"),
        ({"max_batch": True}, OptionError, "max_batch is True"),
        ({"max_batch": "8"}, OptionError, "max_batch is '8'"),
        ({"max_tokens": -5}, OptionError, "max_tokens is -5"),
        ({"max_tokens": 10.5}, OptionError, "max_tokens is 10.5"),
        ({"max_tokens": 129}, OptionError, "129, but the model's positions end at 128"),
        ({"revision": "main"}, OptionError, "revision is 'main'"),
    ],
)
def test_load_refuses(
    arguments: dict[str, Any], kind: type[Exception], message: str, checkpoints: Path
) -> None:
    with pytest.raises(kind, match=message):
        load(checkpoint(checkpoints, "gpt2"), **{"backend": "cpu", **arguments})


def test_a_row_that_cannot_fit_is_no_model(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmi_multi.backends.cpu._cache_memory", lambda *_: 1000)
    with pytest.raises(CapacityError, match=r"a row of 128 tokens needs .* lower max_tokens"):
        load(checkpoint(checkpoints, "gpt2"), backend="cpu")


def test_limits(checkpoints: Path) -> None:
    with load(checkpoint(checkpoints, "gpt2"), backend="cpu", max_batch=3, max_tokens=40) as opened:
        assert (opened.limits.max_batch, opened.limits.max_tokens) == (3, 40)
        assert opened.limits.blocks * opened.limits.block_size >= 3 * 40
        assert opened.backend == "cpu"


@pytest.mark.parametrize("name", ["prefix_caching", "verify"])
@pytest.mark.parametrize("value", ["no", 0, None, 1.0])
def test_flags_are_flags(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{name} is {value!r}; allowed: True or False"):
        lmi_multi.load("demo", **{name: value})


def test_a_backend_that_is_no_name() -> None:
    with pytest.raises(OptionError, match=r"backend is \[\], must be auto, cuda, neuron, cpu"):
        lmi_multi.load("demo", backend=[])  # type: ignore[arg-type]


def test_an_interrupted_close_can_be_repeated(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = model(artifact(checkpoints, "gpt2"))
    with monkeypatch.context() as patch:
        patch.setattr(opened._engine._changed, "wait_for", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            opened.close()
    opened.close()
    assert "_network" not in vars(opened._engine.executor)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_options_are_completed_once_for_prompts_that_share_them(gpt2: Model) -> None:
    """Also where prompts have other lengths, unless that or a seed of their own sets them apart."""

    def completed(**options: Any) -> list[Any]:
        _, _, jobs = gpt2._jobs([[5], [6, 7], [8]], None, options)
        return [job.answers[0].options for job in jobs]

    first, *others = completed(max_new_tokens=3)
    assert all(other is first for other in others)
    first, second, third = completed(max_length=9)
    assert [first.max_new_tokens, second.max_new_tokens] == [8, 7] and first == third
    assert len({own.seed for own in completed(max_new_tokens=3, do_sample=True)}) == 3
