"""Captured decode steps, begun ahead of the host: the same tokens as the CPU's executor draws."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lmi_multi import backends
from lmi_multi.backends.base import Limits
from lmi_multi.model import Model
from tests import tiny_models
from tests.families import GENERATORS, VOCAB

pytestmark = pytest.mark.cuda
LIMITS = Limits(max_batch=12, max_tokens=64, max_step_tokens=64, blocks=200, block_size=8)

# Of each kind of draw that a graph can hold, and of those that it cannot.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"min_new_tokens": 9},
    {"suppress_tokens": [5, 6, 7]},
    {"do_sample": True, "seed": 3},
    {"do_sample": True, "seed": 4, "temperature": 0.4, "top_k": 5},
    {"do_sample": True, "seed": 5, "top_p": 0.6, "top_k": 40},
    {"do_sample": True, "seed": 6, "top_p": 0.5, "min_p": 0.02},
    {"do_sample": True, "seed": 7, "typical_p": 0.5, "min_new_tokens": 4},
    {"do_sample": True, "seed": 8, "num_return_sequences": 3},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"logprobs": 2},
    {"num_beams": 3, "num_return_sequences": 2},
    {"logit_bias": {9: 2.0}},
]


@pytest.fixture(scope="module", autouse=True)
def _available() -> None:
    state = backends.probe("cuda")
    if not state.ok or state.reason != "compiled kernels":
        pytest.skip(f"cuda: {state.reason}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def cuda_model(folder: Path, family: str, program_rows: int = 8, **limits: Any) -> Model:
    from lmi_multi.backends.cuda.executor import CudaExecutor
    from lmi_multi.backends.cuda.ops import Scratch

    from lmi_multi.parallel.collectives import SingleRank

    artifact = tiny_models.artifact(folder, family)
    device = torch.device("cuda", 0)
    tensors = {name: t.to(device) for name, t in artifact.load_rank(0, 1).items()}
    executor = CudaExecutor(
        artifact.spec,
        tensors,
        Limits(**{**vars(LIMITS), **limits}),
        Scratch(device),
        SingleRank(),
        program_rows=program_rows,
    )
    return Model(artifact, "cuda", executor)


def cpu_model(folder: Path, family: str) -> Model:
    return tiny_models.model(tiny_models.artifact(folder, family), **vars(LIMITS))


def prompts(count: int, seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [
        [chance.randrange(3, VOCAB) for _ in range(chance.randint(1, 20))] for _ in range(count)
    ]


def assert_same_as_cpu(folder: Path, family: str, model: Model) -> None:
    """Two prompts of each kind, more than there are rows, in one call and one by one."""
    own = prompts(2 * len(OPTIONS), 1)
    options = [{"max_new_tokens": 8 + i % 9, **o} for i, o in enumerate(OPTIONS * 2)]
    with cpu_model(folder, family) as cpu:
        expected = [
            [c.token_ids for c in cpu.generate([p], o)] for p, o in zip(own, options, strict=True)
        ]
    with model:
        found = iter(model.generate(own, options))
        together = [[next(found).token_ids for _ in answers] for answers in expected]
        alone = [
            [c.token_ids for c in model.generate([p], o)] for p, o in zip(own, options, strict=True)
        ]
        assert tiny_models.is_clean(model)
    assert alone == expected
    assert together == expected


@pytest.mark.parametrize("program_rows", [8, 0])
@pytest.mark.parametrize("family", sorted(GENERATORS))
def test_tokens_are_those_of_the_cpu(folder: Path, family: str, program_rows: int) -> None:
    assert_same_as_cpu(folder, family, cuda_model(folder, family, program_rows))


@pytest.mark.parametrize("family", ["t5", "bloom", "llama"])
def test_steps_are_begun_ahead(monkeypatch: pytest.MonkeyPatch, folder: Path, family: str) -> None:
    """All but the first of a plain answer's; none of one whose options read its tokens."""
    from lmi_multi.backends.cuda.ahead import Flight

    place, found = Flight.place, []
    monkeypatch.setattr(Flight, "place", lambda *own: found.append(place(*own)) or found[-1])
    with cuda_model(folder, family) as model:
        model.generate(prompts(5, 2), max_new_tokens=12, ignore_eos=True)
        assert len(found) - found.count(None) == 5 * 11
        found.clear()
        model.generate(prompts(5, 2), max_new_tokens=12, ignore_eos=True, repetition_penalty=1.5)
        assert found == []


def test_ends_and_cancellations_leave_others_alone(folder: Path) -> None:
    """Streams closed at every length, beside answers that must not notice."""
    own = prompts(40, 3)
    with cpu_model(folder, "gpt2") as cpu:
        expected = [cpu.generate([p], max_new_tokens=14)[0].token_ids for p in own]
    with cuda_model(folder, "gpt2") as model:
        for i, (cut, kept) in enumerate(itertools.pairwise(own)):
            stream = model.stream([cut, kept], max_new_tokens=14)
            own_tokens: list[int] = []
            for n, chunk in enumerate(stream):
                own_tokens += chunk.token_ids if chunk.index == 1 else []
                if n == i % 7:
                    break
            stream.close()
            assert own_tokens == expected[i + 1][: len(own_tokens)]
            assert model.generate([kept], max_new_tokens=14)[0].token_ids == expected[i + 1]
            assert tiny_models.is_clean(model)


def test_ten_thousand_mixed_requests(folder: Path) -> None:
    """No block and no memory is lost, and no answer is another's."""
    chance = random.Random(4)
    distinct = [
        (p, {"max_new_tokens": chance.randint(9, 16), **chance.choice(OPTIONS)})
        for p in prompts(250, 5)
    ]
    with cuda_model(folder, "llama", max_batch=64, blocks=1000) as model:
        before: dict[int, list[list[int]]] = {}
        used = 0
        for turn in range(40):
            order = chance.sample(range(250), 250)
            answers = iter(
                model.generate(*map(list, zip(*(distinct[i] for i in order), strict=True)))
            )
            for i in order:
                count = distinct[i][1].get("num_return_sequences", 1)
                tokens = [next(answers).token_ids for _ in range(count)]
                assert before.setdefault(i, tokens) == tokens
            assert tiny_models.is_clean(model)
            if turn == 20:
                used = torch.cuda.memory_allocated()
        # A graph may have been captured since; but 5,000 requests that each leave a tensor, the
        # smallest of which takes 512 bytes, would take more than this.
        assert torch.cuda.memory_allocated() < used + 2**20
