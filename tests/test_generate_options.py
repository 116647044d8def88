"""Every option through a loaded model, token by token against Hugging Face's generate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ByT5Tokenizer, PreTrainedModel

import lmi_multi
from lmi_multi.errors import OptionError
from lmi_multi.model import Model
from tests.families import FAMILIES, VOCAB

EOS = 2
NEW = 12
PROMPTS = [[5, 9, 17, 33, 9, 17], [71], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49]]
THEIR_NAMES = {"bad_words": "bad_words_ids", "logit_bias": "sequence_bias"}


@dataclass
class Pair:
    """The same checkpoint twice."""

    theirs: PreTrainedModel
    ours: Model

    @property
    def encoder(self) -> bool:
        return bool(self.theirs.config.is_encoder_decoder)

    def hugging_face(self, prompt: list[int], **options: Any) -> list[int]:
        """Its greedy tokens for one prompt."""
        given = {THEIR_NAMES.get(name, name): value for name, value in options.items()}
        if bias := given.get("sequence_bias"):
            given["sequence_bias"] = {(token,): float(value) for token, value in bias.items()}
        ids = torch.tensor([prompt])
        tokens = self.theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            # transformers sizes T5's cache by the encoder's depth and fails on a deeper decoder
            use_cache=not self.encoder,
            **{"max_new_tokens": NEW} | given,
        )[0].tolist()
        return [*tokens][1 if self.encoder else len(prompt) :]


@pytest.fixture(scope="module", params=["t5", "gpt2", "bloom", "llama"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("options") / request.param
    theirs = FAMILIES[request.param].save(folder)
    with lmi_multi.load(folder, backend="cpu", dtype="fp32", max_batch=8, max_tokens=64) as ours:
        yield Pair(theirs, ours)


def bad_words(plain: list[int]) -> list[list[int]]:
    """A token, a pair and a triple that would come, and some that would not."""
    return [[plain[0]], plain[2:4], plain[5:8], [EOS], [1, 2, 3], [7] * 30]


OPTIONS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.8},
    {"encoder_repetition_penalty": 2.0},
    {"encoder_repetition_penalty": 0.5},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"suppress_tokens": list(range(0, VOCAB, 2))},
    {"forced_bos_token_id": 60},
    {"forced_eos_token_id": EOS},
    {"forced_eos_token_id": [70, 55]},
    {"logit_bias": {7: 3.0, 60: 2.5, 9: -20}},
    {"logit_bias": {EOS: 100}, "min_new_tokens": 5},
    {"logit_bias": {EOS: 8}},
    {
        "repetition_penalty": 1.4,
        "encoder_repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "suppress_tokens": [3, 5, 7],
        "forced_bos_token_id": 61,
        "forced_eos_token_id": EOS,
        "logit_bias": {11: 1.0},
        "min_new_tokens": 3,
    },
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options)[:40])
def test_greedy_equals_hugging_face(pair: Pair, options: dict[str, Any]) -> None:
    ours = pair.ours.generate(PROMPTS, options, max_new_tokens=NEW)
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        assert completion.token_ids == pair.hugging_face(prompt, **options)


def test_most_options_change_something(pair: Pair) -> None:
    """Equality above would prove little if the options had no effect on these models."""
    plain = [pair.hugging_face(prompt) for prompt in PROMPTS]
    changed = [[pair.hugging_face(p, **options) for p in PROMPTS] != plain for options in OPTIONS]
    assert sum(changed) >= len(OPTIONS) - 3


def test_bad_words_equal_hugging_face(pair: Pair) -> None:
    for prompt in PROMPTS:
        plain = pair.hugging_face(prompt)
        words = bad_words(plain)
        [ours] = pair.ours.generate([prompt], bad_words=words, max_new_tokens=NEW)
        assert ours.token_ids == pair.hugging_face(prompt, bad_words=words) != plain


def mixed(count: int) -> list[dict[str, Any]]:
    """Options of every kind, greedy and drawn, one set a prompt."""
    drawn = {"do_sample": True, "temperature": 1.3, "top_k": 0}
    kinds: list[dict[str, Any]] = [
        {},
        *OPTIONS,
        drawn,
        drawn | {"min_p": 0.1},
        drawn | {"typical_p": 0.6, "logprobs": 3},
        drawn | {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
        drawn | {"presence_penalty": 1.5, "frequency_penalty": 0.5, "logprobs": 1},
        {"presence_penalty": -1.0, "logprobs": 20},
        {"stop_token_ids": list(range(50, 60)), "logprobs": 0},
        drawn | {"bad_words": [[i] for i in range(0, 90)], "no_repeat_ngram_size": 2},
    ]
    return [kinds[i % len(kinds)] | {"seed": i, "max_new_tokens": NEW} for i in range(count)]


def test_each_of_many_mixed_prompts_is_as_if_alone(pair: Pair) -> None:
    """More prompts than rows, so that they also come and go."""
    options = mixed(64)
    prompts = [PROMPTS[i % 3] for i in range(len(options))]
    together = pair.ours.generate(prompts, options)
    for prompt, own, among in zip(prompts, options, together, strict=True):
        [alone] = pair.ours.generate([prompt], own)
        assert among.token_ids == alone.token_ids
        assert among.finish_reason == alone.finish_reason
        values = [[e.logprob for e in one.logprobs or ()] for one in (among, alone)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)
        assert bool(values[0]) == ("logprobs" in own)


def test_logprobs_equal_hugging_faces(pair: Pair) -> None:
    """Those of the model itself, though a penalty and bans change what comes."""
    options = {"repetition_penalty": 1.5, "suppress_tokens": list(range(0, VOCAB, 3))}
    prompt = PROMPTS[0]
    [ours] = pair.ours.generate([prompt], options, logprobs=4, max_new_tokens=NEW)
    ids = torch.tensor([prompt])
    theirs = pair.theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        use_cache=not pair.encoder,
        max_new_tokens=NEW,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    assert ours.logprobs is not None and len(ours.logprobs) == len(theirs.logits)
    for entry, token, logits in zip(ours.logprobs, ours.token_ids, theirs.logits, strict=True):
        scores = logits[0].log_softmax(-1)
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(scores[token].item(), abs=1e-4)
        best = scores.topk(4)
        assert list(entry.top) == best.indices.tolist()
        assert list(entry.top.values()) == pytest.approx(best.values.tolist(), abs=1e-4)
    total = sum(entry.logprob for entry in ours.logprobs)
    assert ours.cumulative_logprob == pytest.approx(total)
    [plain] = pair.ours.generate([prompt], max_new_tokens=2)
    assert plain.logprobs is None and plain.cumulative_logprob is None


def test_stop_tokens(pair: Pair) -> None:
    def run(**options: Any) -> tuple[str, list[int]]:
        [own] = pair.ours.generate(PROMPTS[:1], options, max_new_tokens=NEW)
        return own.finish_reason, own.token_ids

    _, plain = run()
    stop = plain[4]
    until = plain[: plain.index(stop) + 1]
    assert run(stop_token_ids=[stop]) == ("stop", until)
    assert run(stop_token_ids=[stop, 1], ignore_eos=True) == ("stop", until)
    reason, tokens = run(stop_token_ids=[stop], min_new_tokens=NEW)
    assert reason == "length" and stop not in tokens
    # The same token as an end token: the model's own meaning comes first.
    assert run(stop_token_ids=[EOS], logit_bias={EOS: 100})[0] == "eos"


def test_a_prompt_that_excludes_every_token_fails_alone(pair: Pair) -> None:
    """Its neighbours in the same steps do not notice."""
    plain = pair.ours.generate(PROMPTS[0], max_new_tokens=NEW)[0].token_ids
    sick, well = pair.ours.generate(
        [PROMPTS[1], PROMPTS[0]],
        [{"suppress_tokens": list(range(VOCAB)), "logprobs": 2}, {}],
        max_new_tokens=NEW,
    )
    assert sick.finish_reason == "numerical_error" and sick.token_ids == []
    assert sick.error is not None and sick.error.endswith("or the options exclude every token")
    assert well.token_ids == plain


def test_what_a_model_cannot_do_is_refused_before_anything_runs(pair: Pair) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"num_return_sequences": 2}, "prompt 0: num_return_sequences is 2"),
        ({"bad_words": ["text"]}, "prompt 0: bad_words has 'text', and the model has no tokeni"),
    ]
    if pair.encoder:
        refused.append(({"return_full_text": True}, "prompt 0: return_full_text is True"))
    for options, message in refused:
        with pytest.raises(OptionError, match=message):
            pair.ours.generate(PROMPTS, options)


def test_rank_processes_get_what_rows_ask_for(tmp_path: Path) -> None:
    FAMILIES["gpt2"].save(tmp_path)
    options = mixed(24)
    prompts = [PROMPTS[i % 3] for i in range(len(options))]
    answers = []
    for degree in (1, 2):
        with lmi_multi.load(
            tmp_path, backend="cpu", dtype="fp32", tensor_parallel=degree, max_tokens=64
        ) as model:
            found = model.generate(prompts, options)
            answers.append([(own.token_ids, own.finish_reason) for own in found])
            assert any(own.logprobs for own in found)
    assert answers[0] == answers[1]


# --- text


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A decoder with a tokenizer of bytes: a character's id is its code + 3."""
    folder = tmp_path_factory.mktemp("writer")
    FAMILIES["gpt2"].save(folder, vocab=259)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    with lmi_multi.load(folder, backend="cpu", dtype="fp32", max_tokens=64) as model:
        yield model


LETTERS = {ord(letter) + 3 for letter in "abc "}
SPEAK = {  # these letters only
    "suppress_tokens": sorted({*range(259)} - LETTERS),
    **{"do_sample": True, "temperature": 20.0, "max_new_tokens": 30},
}


def test_the_stop_token_is_no_part_of_the_text(writer: Model) -> None:
    [own] = writer.generate("ab", SPEAK, seed=1, stop_token_ids=[ord("c") + 3])
    assert own.finish_reason == "stop" and own.token_ids[-1] == ord("c") + 3
    assert own.text is not None and len(own.text) == len(own.token_ids) - 1
    assert "".join(c.text or "" for c in writer.stream("ab", SPEAK, seed=1, stop="c")) == own.text


def test_full_text_begins_with_the_prompt(writer: Model) -> None:
    for prompt in ("ab", [100, 101]):
        [part] = writer.generate([prompt], SPEAK, seed=2)
        [whole] = writer.generate([prompt], SPEAK, seed=2, return_full_text=True)
        assert part.text is not None and whole.token_ids == part.token_ids
        assert whole.text == "ab" + part.text


def test_bad_words_as_text_never_come(writer: Model) -> None:
    seeds = [{"seed": seed} | SPEAK for seed in range(8)]
    plain = writer.generate(["ab"] * 8, seeds)
    assert any("ab" in (own.text or "") for own in plain)
    own = writer.generate(["ab"] * 8, seeds, bad_words=["ab", "ca"])
    assert not any(word in "b" + (o.text or "") for o in own for word in ("ab", "ca"))
