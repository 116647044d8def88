"""Beam search through a loaded model, answer by answer against Hugging Face's generate."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

import lmi_multi
from lmi_multi.errors import OptionError
from tests.families import FAMILIES, VOCAB
from tests.test_generate_options import EOS, PROMPTS, Pair, mixed
from tests.tiny_models import Watched, artifact, executor, is_clean, model

NEW = 12
BAD = 100
SHAPES = ["t5", "gpt2", "bloom", "llama"]


def theirs(pair: Pair, prompt: list[int], **options: Any) -> tuple[list[list[int]], list[float]]:
    """Hugging Face's answers and their scores, the best first, without padding."""
    ids = torch.tensor([prompt])
    names = {"bad_words": "bad_words_ids", "logit_bias": "sequence_bias"}
    given = {names.get(name, name): value for name, value in options.items()}
    if bias := given.get("sequence_bias"):
        given["sequence_bias"] = {(token,): float(value) for token, value in bias.items()}
    found = pair.theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        pad_token_id=VOCAB - 1,  # no answer here holds it
        use_cache=not pair.encoder,
        **{"max_new_tokens": NEW} | given,
    )
    start = 1 if pair.encoder else len(prompt)
    answers = [row[start:] for row in found.sequences.tolist()]
    stripped = [row[: row.index(VOCAB - 1)] if VOCAB - 1 in row else row for row in answers]
    return stripped, found.sequences_scores.tolist()


@pytest.fixture(scope="module", params=SHAPES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("beams") / request.param
    reference = FAMILIES[request.param].save(folder)
    with lmi_multi.load(folder, backend="cpu", dtype="fp32", max_batch=16, max_tokens=64) as ours:
        yield Pair(reference, ours)


@pytest.fixture(scope="module")
def moved() -> Iterator[list[bool]]:
    """For every answer that was compared, whether a tie let it change its place: few may."""
    found: list[bool] = []
    yield found
    assert sum(found) <= len(found) / 500, f"{sum(found)} of {len(found)} answers"


# An end token likely enough that beams end at different lengths.
ENDS = {"logit_bias": {EOS: 3.0}, "suppress_tokens": [VOCAB - 1]}
OPTIONS: list[dict[str, Any]] = [
    *(
        ENDS | {"num_beams": n, "num_return_sequences": n, "early_stopping": early} | penalty
        for n, early, penalty in itertools.product(
            [2, 3, 8],
            [False, True, "never"],
            [{}, {"length_penalty": 0.3}, {"length_penalty": -1.5}, {"length_penalty": 2.0}],
        )
    ),
    ENDS | {"num_beams": 16, "num_return_sequences": 16, "max_new_tokens": 20},
    ENDS | {"num_beams": 4, "max_new_tokens": 1, "num_return_sequences": 4},
    ENDS | {"num_beams": 4, "repetition_penalty": 1.5, "num_return_sequences": 2},
    ENDS | {"num_beams": 4, "encoder_repetition_penalty": 1.5},
    ENDS | {"num_beams": 4, "no_repeat_ngram_size": 2, "min_new_tokens": 6},
    ENDS | {"num_beams": 4, "bad_words": [[5], [60, 61], [EOS]]},
    ENDS | {"num_beams": 4, "forced_eos_token_id": EOS, "num_return_sequences": 4},
    ENDS | {"num_beams": 4, "forced_bos_token_id": 60, "num_return_sequences": 3},
    {"num_beams": 4, "suppress_tokens": list(range(0, VOCAB, 2)), "num_return_sequences": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values()))[-40:])
def test_equals_hugging_face(pair: Pair, moved: list[bool], options: dict[str, Any]) -> None:
    answers = options.get("num_return_sequences", 1)
    ours = pair.ours.generate(
        PROMPTS, options | {"max_new_tokens": options.get("max_new_tokens", NEW)}
    )
    for number, prompt in enumerate(PROMPTS):
        tokens, scores = theirs(pair, prompt, **options)
        mine = ours[number * answers : (number + 1) * answers]
        assert [c.score for c in mine] == pytest.approx(scores, rel=1e-6, abs=2e-5)
        # Only answers whose scores tie may change places.
        for place in range(answers):
            tied = [i for i in range(answers) if abs(scores[i] - scores[place]) < 2e-5]
            assert mine[place].token_ids in [tokens[i] for i in tied]
            moved.append(mine[place].token_ids != tokens[place])
        assert len({tuple(c.token_ids) for c in mine}) == answers
    assert is_clean(pair.ours)


# --- diverse beams


Answers = list[tuple[float, list[int]]]


def diverse(pair: Pair, prompt: list[int], options: dict[str, Any]) -> Answers:
    """Answers of diverse beam search, written down plainly over Hugging Face's logits.

    As `group_beam_search` of transformers 4: every group keeps its own hypotheses; what runs at
    the end becomes one.
    """
    groups, beams = options["num_beam_groups"], options["num_beams"]
    width, penalty = beams // groups, options["diversity_penalty"]
    power, early = options.get("length_penalty", 1.0), options.get("early_stopping", False)
    running: list[Answers] = [[(0.0, [])] for _ in range(groups)]
    finished: list[Answers] = [[] for _ in range(groups)]
    for step in range(1, NEW + 1):
        taken: list[int] = []
        for group in range(groups):
            if not running[group]:
                continue
            entries = []
            for score, tokens in running[group]:
                row = log_probs(pair, prompt, tokens) + score
                for token in taken:
                    row[token] -= penalty
                entries += [(row[t].item(), [*tokens, t]) for t in range(VOCAB)]
            entries.sort(key=lambda entry: -entry[0])
            entries = entries[: 2 * width]
            ended = [(s / step**power, t) for s, t in entries[:width] if t[-1] == EOS]
            running[group] = [(s, t) for s, t in entries if t[-1] != EOS][:width]
            taken += [tokens[-1] for _, tokens in running[group]]
            if step == NEW:
                ended += [(s / step**power, t) for s, t in running[group]]
            best = sorted(finished[group] + ended, key=lambda entry: -entry[0])[:width]
            finished[group] = best
            if len(best) == width and (early or best[-1][0] >= entries[0][0] / step**power):
                running[group] = []
    return sorted(itertools.chain(*finished), key=lambda entry: -entry[0])


def log_probs(pair: Pair, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    if pair.encoder:
        inputs = {"input_ids": torch.tensor([prompt])}
        inputs["decoder_input_ids"] = torch.tensor([[0, *tokens]])
    else:
        inputs = {"input_ids": torch.tensor([[*prompt, *tokens]])}
    with torch.inference_mode():
        logits = pair.theirs(**inputs).logits[0, -1].float()
    scores = logits.log_softmax(-1)
    scores[EOS] += ENDS["logit_bias"][EOS]
    scores[VOCAB - 1] = -torch.inf
    return scores


DIVERSE: list[dict[str, Any]] = [
    {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 2.0, "length_penalty": 0.5},
    {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.1, "early_stopping": True},
]


@pytest.mark.parametrize(
    "options", DIVERSE, ids=lambda o: f"{o['num_beams']}-{o['num_beam_groups']}"
)
def test_diverse_beams(pair: Pair, options: dict[str, Any]) -> None:
    answers = options["num_beams"]
    given = ENDS | options | {"num_return_sequences": answers, "max_new_tokens": NEW}
    for prompt in PROMPTS[:2]:
        expected = diverse(pair, prompt, options)
        ours = pair.ours.generate([prompt], given)
        assert [c.score for c in ours] == pytest.approx([s for s, _ in expected], abs=1e-4)
        tokens = [t for _, t in expected]
        assert sorted(c.token_ids for c in ours) == sorted(tokens)
        plain = ENDS | {"num_beams": answers, "num_return_sequences": answers}
        same = pair.ours.generate([prompt], plain, max_new_tokens=NEW)
        assert sorted(c.token_ids for c in same) != sorted(tokens)


# --- beside other rows


def mixed_with_beams(count: int) -> list[dict[str, Any]]:
    """Options of every kind, every third prompt with beams."""
    beams: list[dict[str, Any]] = [
        ENDS | {"num_beams": 4, "num_return_sequences": 2, "logprobs": 2},
        ENDS | {"num_beams": 2, "early_stopping": "never", "length_penalty": 2.0},
        {"num_beams": 6, "num_beam_groups": 2, "diversity_penalty": 0.7, "repetition_penalty": 1.3},
        ENDS | {"num_beams": 3, "early_stopping": True, "num_return_sequences": 3},
    ]
    made = mixed(count)
    for number in range(0, count, 3):
        made[number] = beams[number // 3 % 4] | {"max_new_tokens": NEW}
    return made


@pytest.mark.parametrize("family", ["gpt2", "t5", "mistral-window"])
@pytest.mark.parametrize(
    "limits",
    [{"max_batch": 8}, {"max_batch": 6, "max_step_tokens": 7}, {"block_size": 2, "blocks": 96}],
    ids=["queues", "slices", "small-blocks"],
)
def test_each_of_many_mixed_prompts_is_as_if_alone(
    family: str, limits: dict[str, int], checkpoints: Path
) -> None:
    options, random = mixed_with_beams(64), Random(1)
    prompts = [[random.randrange(3, VOCAB) for _ in range(1 + i % 13)] for i in range(64)]
    built = artifact(checkpoints, family)
    with model(built, max_batch=8) as plain, model(built, **{"max_batch": 8} | limits) as opened:
        alone = [plain.generate([p], own) for p, own in zip(prompts, options, strict=True)]
        together = opened.generate(prompts, options)
        assert is_clean(plain) and is_clean(opened)
    expected = list(itertools.chain(*alone))
    assert [c.token_ids for c in together] == [c.token_ids for c in expected]
    assert [c.finish_reason for c in together] == [c.finish_reason for c in expected]
    for mine, own in zip(together, expected, strict=True):
        assert (mine.score is None) == (own.score is None)
        assert mine.score is None or mine.score == pytest.approx(own.score, abs=1e-4)


def test_the_prompt_is_computed_once_and_shared(checkpoints: Path) -> None:
    for family, cross in (("gpt2", 0), ("t5", 4)):
        built = artifact(checkpoints, family)
        watched = Watched(executor(built, block_size=4))
        with model(built, watched) as opened:
            prompt = list(range(10, 26))
            opened.generate([prompt], num_beams=4, max_new_tokens=9, ignore_eos=True)
        assert sum(len(batch.prompts) for batch in watched.batches) == (cross > 0)
        first, *steps = watched.batches
        assert [len(row.token_ids) for row in first.rows] == [1 if cross else 16]
        for batch in steps:
            assert len(batch.rows) == 4
            assert len({tuple(row.cross_blocks) for row in batch.rows}) == 1
            assert len(batch.rows[0].cross_blocks) == cross
            whole = (1 if cross else 16) // 4
            assert len({tuple(row.blocks[:whole]) for row in batch.rows}) == 1
        copies = [len(row.copies) for batch in steps for row in batch.rows]
        assert sum(copies) < 4 * len(steps)


# --- what else a caller may ask of beams


def test_log_probabilities(pair: Pair) -> None:
    options = ENDS | {"num_beams": 4, "num_return_sequences": 3, "logprobs": 2}
    [*ours] = pair.ours.generate(PROMPTS[:1], options, max_new_tokens=NEW)
    scores = pair.ours.score(PROMPTS[:1] * 3, [c.token_ids for c in ours])
    for completion, expected in zip(ours, scores, strict=True):
        assert completion.logprobs is not None
        assert [e.token_id for e in completion.logprobs] == completion.token_ids
        assert np.allclose([e.logprob for e in completion.logprobs], expected, atol=1e-4)
        assert completion.cumulative_logprob == pytest.approx(expected.sum(), abs=1e-3)
        for entry in completion.logprobs:
            assert len(entry.top) == 2
            assert entry.top.get(entry.token_id, -torch.inf) <= max(entry.top.values())
            if entry.token_id in entry.top:
                assert entry.top[entry.token_id] == pytest.approx(entry.logprob)


def test_stop_tokens_equal_hugging_face(pair: Pair) -> None:
    options = ENDS | {"num_beams": 3, "num_return_sequences": 3}
    expected, _ = theirs(pair, PROMPTS[0], **options, eos_token_id=[EOS, 60, 61, 62])
    ours = pair.ours.generate(PROMPTS[:1], options, stop_token_ids=[60, 61, 62], max_new_tokens=NEW)
    assert [c.token_ids for c in ours] == expected
    for completion in ours:
        last = completion.token_ids[-1]
        reason = "eos" if last == EOS else "stop" if last in (60, 61, 62) else "length"
        assert completion.finish_reason == reason


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_stop_strings(family: str, checkpoints: Path) -> None:
    """With a byte a token a stop string of one byte is a stop token that the text leaves out."""
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 10}
    with model(artifact(checkpoints, family, tokenizer=True)) as opened:
        prompts = [chr(code) for code in range(97, 123)]
        texts = [(p, c.text) for p in prompts for c in opened.generate(p, options)]
        prompt, text = next(
            (p, found.group())
            for p, whole in texts
            if whole and (found := re.search("[ -~][ -~]", whole))
        )
        for stop in (text[0], text):
            found = opened.generate(prompt, options, stop=[stop])
            for completion in found:
                whole = bytes(t - 3 for t in completion.token_ids if t > 2)
                assert (completion.finish_reason == "stop") == (stop.encode() in whole)
                assert completion.text is not None and stop not in completion.text
            if len(stop) == 1:
                token = ord(stop) + 3
                assert any(c.finish_reason == "stop" for c in found)
                same = opened.generate(prompt, options, stop_token_ids=[token])
                assert [c.token_ids for c in same] == [c.token_ids for c in found]
                assert [c.text for c in same] == [c.text for c in found]


def test_a_stream_brings_each_answer_whole(checkpoints: Path) -> None:
    with model(artifact(checkpoints, "t5", tokenizer=True)) as opened:
        options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8}
        expected = opened.generate(["one", "two"], options)
        chunks = list(opened.stream(["one", "two"], options))
        assert sorted((c.index, c.answer) for c in chunks) == [(0, 0), (0, 1), (1, 0), (1, 1)]
        for chunk in chunks:
            completion = expected[2 * chunk.index + chunk.answer]
            assert (chunk.text, chunk.token_ids) == (completion.text, completion.token_ids)
            assert chunk.finish_reason == completion.finish_reason
        for started in range(3):
            stream = opened.stream(["one", "two"], [options, {"max_new_tokens": 8}])
            for _ in itertools.islice(stream, started):
                pass
            stream.close()  # type: ignore[attr-defined]
            assert is_clean(opened)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_search_with_nan_ends_alone(family: str, checkpoints: Path) -> None:
    opened = executor(artifact(checkpoints, family, tokenizer=True))
    opened._network.weights.embed[BAD] = float("nan")
    options = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 6}
    options["suppress_tokens"] = [BAD]
    with model(artifact(checkpoints, family, tokenizer=True), opened) as broken:
        first, second, *others = broken.generate([[5, BAD], [7, 8], [9]], options)
        for sick in (first, second):
            assert sick.finish_reason == "numerical_error" and sick.token_ids == []
            assert str(sick.error).startswith("logits of generated token 0 hold NaN or infinity")
        assert len(others) == 4
        assert is_clean(broken)


def test_options_that_leave_too_few_answers(pair: Pair) -> None:
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 2}
    forced = {"forced_eos_token_id": EOS, "suppress_tokens": [*range(3, VOCAB), 0]}
    first, second, third = pair.ours.generate(PROMPTS[:1], options | forced)
    assert sorted(c.token_ids for c in (first, second)) == [[1, EOS], [EOS]]
    assert third.finish_reason == "numerical_error" and third.token_ids == []
    assert third.error == "the options leave only 2 different answers"


def test_what_the_model_was_loaded_for(checkpoints: Path) -> None:
    with model(artifact(checkpoints, "gpt2"), max_batch=3, blocks=8) as opened:
        with pytest.raises(
            OptionError, match="prompt 1: num_beams is 4; allowed: at most 3, the m"
        ):
            opened.generate([[5], [6]], [{}, {"num_beams": 4}])
        with pytest.raises(OptionError, match="needs 24 cache blocks of 8 tokens; allowed: at mo"):
            opened.generate([[5]], num_beams=3, max_new_tokens=60)
        assert len(opened.generate([[5]], num_beams=3, max_new_tokens=16)[0].token_ids) <= 16
        assert is_clean(opened)
