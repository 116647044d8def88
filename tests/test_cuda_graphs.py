"""Captured decode steps, begun ahead of the host: the same tokens as the CPU's executor draws."""

from __future__ import annotations

import gc
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lmi_multi import backends
from lmi_multi.backends.base import Limits
from lmi_multi.backends.drawing import draw
from lmi_multi.checkpoint.layout import DtypeName
from lmi_multi.completion import Completion
from lmi_multi.engine.batch import Batch, Row
from lmi_multi.model import Model
from lmi_multi.ops.beams import Beams
from lmi_multi.ops.sampling import SampleRow
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
    {"encoder_repetition_penalty": 1.4, "presence_penalty": 0.7, "frequency_penalty": -0.3},
    {"bad_words": [[9], [5, 6], [30, 31, 32]], "forced_eos_token_id": 7, "logprobs": 0},
    {"forced_bos_token_id": 11, "repetition_penalty": 0.7, "min_new_tokens": 3},
    {
        "do_sample": True,
        "seed": 9,
        "top_k": 30,
        "top_p": 0.8,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "logprobs": 3,
    },
]

SEARCHES: list[dict[str, Any]] = [
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.3},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    {"num_beams": 2, "min_new_tokens": 5},
    {"num_beams": 3, "early_stopping": True, "stop_token_ids": list(range(3, 30))},
]


@pytest.fixture(scope="module", autouse=True)
def _available() -> None:
    state = backends.probe("cuda")
    if not state.ok or state.reason != "compiled kernels":
        pytest.skip(f"cuda: {state.reason}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def cuda_model(
    folder: Path, family: str, program_rows: int = 8, dtype: DtypeName = "fp32", **limits: Any
) -> Model:
    from lmi_multi.backends.cuda.executor import CudaExecutor
    from lmi_multi.backends.cuda.ops import Scratch

    from lmi_multi.parallel.collectives import SingleRank

    artifact = tiny_models.artifact(folder, family, dtype=dtype)
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
        expected = [c for p, o in zip(own, options, strict=True) for c in cpu.generate([p], o)]
    with model:
        together = model.generate(own, options)
        alone = [c for p, o in zip(own, options, strict=True) for c in model.generate([p], o)]
        assert tiny_models.is_clean(model)
    for found in (alone, together):
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]
        assert logprobs(found) == pytest.approx(logprobs(expected), abs=1e-3)


def logprobs(answers: Sequence[Completion]) -> list[float]:
    """All log-probabilities of those that have any: of each token, and of the likeliest."""
    told = [own for answer in answers for own in answer.logprobs or ()]
    return [value for own in told for value in (own.logprob, *own.top.values())]


@pytest.mark.parametrize("program_rows", [8, 0])
@pytest.mark.parametrize("family", sorted(GENERATORS))
def test_tokens_are_those_of_the_cpu(folder: Path, family: str, program_rows: int) -> None:
    assert_same_as_cpu(folder, family, cuda_model(folder, family, program_rows))


@pytest.mark.parametrize("family", ["t5", "bloom", "llama"])
def test_steps_are_begun_ahead(monkeypatch: pytest.MonkeyPatch, folder: Path, family: str) -> None:
    """All but the first of an answer's, whatever its options are."""
    from lmi_multi.backends.cuda.ahead import Flight

    is_of, found = Flight.is_of, []

    def noted(self: Flight, rows: Sequence[Row]) -> bool:
        same = is_of(self, rows)
        found.append(len(rows) if same else 0)
        return same

    monkeypatch.setattr(Flight, "is_of", noted)
    every: list[dict[str, Any]] = [
        {},
        {"do_sample": True, "seed": 1, "top_p": 0.8},
        {"repetition_penalty": 1.5, "logprobs": 2},
        {"no_repeat_ngram_size": 2, "bad_words": [[3, 4]], "logit_bias": {5: 1.0}},
    ]
    with cuda_model(folder, family) as model:
        for seed, own in zip((0, 1, 2, 6), every, strict=True):  # no prompts that begin alike
            found.clear()
            model.generate(prompts(5, seed), own, max_new_tokens=12, ignore_eos=True)
            assert sum(found) == 5 * 11, own


def test_graphs_are_captured_while_tokens_are_unread(folder: Path) -> None:
    """Answers that end one by one: whenever fewer rows go on there is a graph to capture, and the
    last step's tokens, in pinned memory, are still to be read."""
    own = prompts(8, 4)
    lengths = [{"max_new_tokens": 4 + 2 * i, "ignore_eos": True} for i in range(len(own))]
    with cpu_model(folder, "gpt2") as cpu, cuda_model(folder, "gpt2") as model:
        expected = [c.token_ids for c in cpu.generate(own, lengths)]
        assert [c.token_ids for c in model.generate(own, lengths)] == expected


@pytest.mark.parametrize("family", ["t5", "llama", "bloom"])
def test_searches_go_on_inside_graphs(
    monkeypatch: pytest.MonkeyPatch, folder: Path, family: str
) -> None:
    """Several at once, which end at different times; twice, as the second time nothing is made."""
    from lmi_multi.backends.cuda.beams import BeamKind

    own = prompts(6, 11)
    with cpu_model(folder, family) as cpu, cuda_model(folder, family) as model:
        for options in SEARCHES:
            lengths = [{"max_new_tokens": n, **options} for n in (5, 9, 7, 6, 8, 5)]
            expected = cpu.generate(own, lengths)
            for _ in range(2):
                found = model.generate(own, lengths)
                assert [c.token_ids for c in found] == [c.token_ids for c in expected]
                scores = [c.score for c in expected]
                assert [c.score for c in found] == pytest.approx(scores, abs=1e-4)
        opened: Any = model._engine.executor
        captured = {key: graph for key, graph in opened._fed._captured.items() if key[1]}
        assert len(captured) > 4 and all(captured.values())
        assert all(isinstance(kind, BeamKind) for _, kind in captured)
        assert tiny_models.is_clean(model)


@pytest.mark.parametrize("family", ["t5", "bloom", "llama"])
def test_searches_begun_ahead_find_the_same(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those whose steps wait for the host. In a half type: only there nothing need be cleared
    between two steps."""
    from lmi_multi.backends.cuda.searches import Place, Searches

    taken, counts = Searches.taken, []

    def counted(self: Searches, rows: Sequence[Row]) -> dict[int, Place]:
        found = taken(self, rows)
        counts.append(len(found))
        return found

    monkeypatch.setattr(Searches, "taken", counted)
    own, found = prompts(6, 11), []
    for ahead in (False, True):
        counts.clear()
        with cuda_model(tmp_path, family, dtype="bf16") as model:
            opened: Any = model._engine.executor
            assert opened._searches._ahead
            opened._searches._ahead = ahead
            answers = []
            for options in SEARCHES:
                lengths = [{"max_new_tokens": n, **options} for n in (5, 9, 7, 6, 8, 5)]
                for _ in range(2):
                    answers += [(c.token_ids, c.score) for c in model.generate(own, lengths)]
            assert tiny_models.is_clean(model)
        found.append(answers)
        assert sum(counts) > 30 if ahead else not sum(counts)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("rows", "width", "vocab", "keep"),
    [(32, 4, 32128, 16), (64, 8, 50257, 16), (15, 5, 128256, 60), (4, 3, 999, 20), (2, 2, 8, 16)],
)
def test_torch_ranks_in_a_graph_as_it_does_uncaptured(
    rows: int, width: int, vocab: int, keep: int
) -> None:
    """What the kernel does not cover. Of vocabularies that torch ranks in one way and in another,
    with ties as bf16 has them, with tokens that cannot come, and with a beam without usable logits;
    replayed on others."""
    from lmi_multi.backends.cuda.beams import BeamInputs, BeamKind
    from lmi_multi.backends.cuda.capturing import capture
    from lmi_multi.backends.cuda.inputs import StepInputs

    device, kind = torch.device("cuda", 0), BeamKind(width, keep)
    logits = torch.zeros(rows, vocab, device=device)
    beams = BeamInputs(StepInputs(LIMITS, rows, False, device))
    with torch.inference_mode():
        graph = capture(
            lambda: beams.best(logits, kind), torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        )
        for seed in range(3):
            torch.manual_seed(seed)
            logits.copy_(torch.randn(rows, vocab, device=device).bfloat16())
            logits[0, 5:] = -torch.inf
            searches = [tuple((-torch.rand(width)).tolist()) for _ in range(rows // width)]
            batch = [
                Row([5], 0, [1], 1, sample=SampleRow(), beams=Beams(own, keep) if not i else None)
                for own in searches
                for i in range(width)
            ]
            if seed == 2:
                logits[len(batch) - 1, 3] = torch.nan
            beams.fill(batch, kind)
            found = kind.results(graph.replay().cpu(), vocab)
            expected = draw(logits[: len(batch)].clone(), batch)
            for own, other in zip(found, expected, strict=True):
                assert own == other if other.finite else not own.finite


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3}, {"num_beams": 3}], ids=str)
def test_nobody_waits_in_a_step_but_for_its_results(
    monkeypatch: pytest.MonkeyPatch, folder: Path, options: dict[str, Any]
) -> None:
    """Steps of single tokens, blocks that beams copy included; what is made on first use may."""
    from lmi_multi.backends.cuda.executor import CudaExecutor

    step, steps = CudaExecutor.step, []

    def watched(self: CudaExecutor, batch: Batch) -> Any:
        single = all(len(row.token_ids) == 1 for row in batch.rows)
        if not single:
            return step(self, batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self, batch)
        finally:
            steps.append(sum(len(row.copies) for row in batch.rows))
            torch.cuda.set_sync_debug_mode("default")

    own = [[5, 6, 7], [8, 9, 10, 11]]
    with cuda_model(folder, "llama") as model:
        model.generate(own, max_new_tokens=12, ignore_eos=True, **options)
        monkeypatch.setattr(CudaExecutor, "step", watched)
        model.generate(own, max_new_tokens=12, ignore_eos=True, **options)
    assert len(steps) == 11
    assert bool(sum(steps)) == ("num_beams" in options)


def test_a_closed_model_gives_its_memory_back(folder: Path) -> None:
    """All but a workspace of cuBLAS, 32 MiB for each stream; the cache alone is much larger."""
    gc.collect()  # what tests before this one have left
    torch.cuda.empty_cache()
    # What is free in the graphs' pools of models that a failed test keeps is nobody else's.
    left, others = [], torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    for _ in range(2):
        with cuda_model(folder, "llama", blocks=50_000) as model:
            model.generate(prompts(3, 2), max_new_tokens=5)
            cache = model._engine.executor._cache._blocks.nbytes  # type: ignore[attr-defined]
        left.append(torch.cuda.memory_reserved())
        assert left[-1] - torch.cuda.memory_allocated() - others < 32 << 20
    assert cache > 200 << 20
    assert left[1] - left[0] < 100 << 20


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
