"""Scores, embeddings and chat against Hugging Face and sentence-transformers' definitions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer, PreTrainedModel

import lmi_multi
from lmi_multi.errors import OptionError
from lmi_multi.model import Model
from tests.families import FAMILIES

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16, 17]]
ANSWERS = [[20, 21], [22, 23, 24, 25, 26], [27]]


@pytest.fixture(
    scope="module",
    params=["t5", "umt5", "gpt2", "opt-350m", "bloom", "llama-gqa", "mistral-window", "bert"],
)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PreTrainedModel, Model]]:
    folder = tmp_path_factory.mktemp("score") / request.param
    theirs = FAMILIES[request.param].save(folder)
    with lmi_multi.load(folder, backend="cpu", dtype="fp32", max_tokens=60) as ours:
        yield theirs, ours


def test_score_is_the_teacher_forced_log_probability(pair: tuple[PreTrainedModel, Model]) -> None:
    theirs, ours = pair
    if ours.spec.kind == "encoder":
        with pytest.raises(OptionError, match="generates no text"):
            ours.score(PROMPTS, ANSWERS)
        return
    scores = ours.score(PROMPTS, ANSWERS)
    for prompt, answer, mine in zip(PROMPTS, ANSWERS, scores, strict=True):
        with torch.no_grad():
            if theirs.config.is_encoder_decoder:
                start = torch.tensor([[0, *answer]])
                logits = theirs(torch.tensor([prompt]), decoder_input_ids=start).logits[0, :-1]
            else:
                whole = torch.tensor([[*prompt, *answer]])
                logits = theirs(whole).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, expected.numpy(), atol=1e-4)


def test_prompts_are_scored_on_request(pair: tuple[PreTrainedModel, Model]) -> None:
    theirs, ours = pair
    if ours.spec.kind != "decoder":
        if ours.spec.kind == "encoder-decoder":
            with pytest.raises(OptionError, match="prompt_logprobs is True"):
                ours.generate(PROMPTS, prompt_logprobs=True)
        return
    options = [{"prompt_logprobs": True}, {}, {"prompt_logprobs": True}]
    first, second, third = ours.generate(PROMPTS, options, max_new_tokens=2)
    assert second.prompt_logprobs is None
    for completion in (first, third):
        ids = completion.prompt_token_ids
        with torch.no_grad():
            scores = theirs(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected = scores.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert completion.prompt_logprobs is not None
        assert completion.prompt_logprobs[0] is None
        np.testing.assert_allclose(completion.prompt_logprobs[1:], expected.numpy(), atol=1e-4)
    with pytest.raises(OptionError, match="while streaming"):
        ours.stream(PROMPTS, prompt_logprobs=True)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_embeddings_pool_the_last_state(
    pair: tuple[PreTrainedModel, Model], pooling: str, normalize: bool
) -> None:
    theirs, ours = pair
    got = ours.embed(PROMPTS, pooling=pooling, normalize=normalize)  # type: ignore[arg-type]
    encoder = theirs.encoder if theirs.config.is_encoder_decoder else theirs.base_model
    for prompt, mine in zip(PROMPTS, got, strict=True):
        with torch.no_grad():
            hidden = encoder(torch.tensor([prompt])).last_hidden_state[0]
        vector = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        if normalize:
            vector = torch.nn.functional.normalize(vector, dim=0)
        np.testing.assert_allclose(mine, vector.numpy(), atol=1e-4)


def test_what_cannot_be_scored_or_pooled_is_named(pair: tuple[PreTrainedModel, Model]) -> None:
    _, ours = pair
    with pytest.raises(OptionError, match="pooling is 'max', must be mean, cls, last"):
        ours.embed(PROMPTS, pooling="max")  # type: ignore[arg-type]
    assert ours.embed([]).shape == (0, ours.spec.hidden)
    if ours.spec.kind == "encoder":
        return
    with pytest.raises(OptionError, match="2 continuations for 3 prompts"):
        ours.score(PROMPTS, ANSWERS[:2])
    with pytest.raises(OptionError, match="continuation 1 is empty"):
        ours.score(PROMPTS, [[5], [], [6]])
    with pytest.raises(OptionError, match="continuation 0 has 70 tokens, must be at most 60"):
        ours.score([[5]], [[6] * 70])


def test_chat_renders_the_template(tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    from tests.families import Tiny, _gpt

    Tiny("GPT2LMHeadModel", "GPT2Config", _gpt()).save(folder, vocab=259)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
        "{% endif %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    with lmi_multi.load(folder, backend="cpu", dtype="fp32", max_tokens=100) as model:
        messages = [{"role": "user", "content": "hi"}]
        got = model.chat(messages, max_new_tokens=5)
        assert bytes(t - 3 for t in got.prompt_token_ids) == b"u:hi;a:"
        same = model.generate([got.prompt_token_ids], max_new_tokens=5)[0]
        assert got.token_ids == same.token_ids
        with pytest.raises(OptionError, match="no tools"):
            model.chat([{"role": "tool", "content": "x"}])
        with pytest.raises(OptionError, match="message 0 must be a mapping"):
            model.chat([{"role": "user"}])


def test_a_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    from tests.families import Tiny, _gpt

    folder = tmp_path / "evil"
    Tiny("GPT2LMHeadModel", "GPT2Config", _gpt()).save(folder, vocab=259)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = "{{ messages.append(1) }}{{ ''.__class__.__mro__ }}"
    tokenizer.save_pretrained(folder)
    with (
        lmi_multi.load(folder, backend="cpu", max_tokens=64) as model,
        pytest.raises(OptionError, match="template refuses"),
    ):
        model.chat([{"role": "user", "content": "x"}])
