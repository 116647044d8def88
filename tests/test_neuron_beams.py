"""Beam search inside graphs: ranked as the reference ranks, and with the CPU's answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lmi_multi.backends.neuron import search
from torch import Tensor

from lmi_multi import load
from lmi_multi.engine.batch import Row
from lmi_multi.ops.beams import Beams, best_continuations
from lmi_multi.ops.rules import History, Rules
from lmi_multi.ops.sampling import SampleRow
from tests.neuron_models import DEGREES, artifact, ids


def rows_of(scores: tuple[float, ...], keep: int, *samples: SampleRow) -> list[Row]:
    """The beams of one search; of several samples each has its own."""
    given = samples or (SampleRow(),)
    return [
        Row([5], 3, (i,), 3, sample=given[i % len(given)], beams=None if i else Beams(scores, keep))
        for i in range(len(scores))
    ]


def rank(logits: Tensor, rows: list[Row], count: int) -> Any:
    return search.ranked(rows, logits.amax(-1), *search.likeliest(logits, count))


@settings(max_examples=100, deadline=None)
@given(
    width=st.integers(1, 8),
    keep=st.integers(1, search.KEPT),
    vocab=st.sampled_from([2, 17, 1000]),
    rounded=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_continuations_are_those_of_the_reference(
    width: int, keep: int, vocab: int, rounded: bool, seed: int
) -> None:
    """Ties too, of which either choice is right: the scores are equal and no pair comes twice."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(width, vocab, generator=generator) * 3
    logits = logits.round() if rounded else logits
    scores = tuple(torch.randn(width, generator=generator).tolist())
    found = rank(logits, rows_of(scores, keep), min(search.KEPT, vocab))
    own = logits.log_softmax(-1)
    values, places = best_continuations(own, [Beams(scores, keep)])
    assert found.finite
    assert [c.score for c in found.best] == values[0].tolist()
    pairs = [(c.beam, c.token) for c in found.best]
    assert len(set(pairs)) == len(pairs)
    total = own + torch.tensor(scores)[:, None]
    assert [total[pair].item() for pair in pairs] == values[0].tolist()
    if not rounded:
        assert pairs == [divmod(place, vocab) for place in places[0].tolist()]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value: float) -> None:
    logits = torch.randn(2, 30)
    assert rank(logits, rows_of((0.0, -1.0), 4), 8).finite
    logits[1, 4] = value
    assert not rank(logits, rows_of((0.0, -1.0), 4), 8).finite


def test_tokens_that_can_never_come_are_left_out() -> None:
    logits = torch.full((1, 9), float("-inf"))
    logits[0, [2, 7]] = torch.tensor([1.0, 2.0])
    found = rank(logits, rows_of((0.0,), 4), 8)
    assert [c.token for c in found.best] == [7, 2]


def test_what_is_left_to_the_host() -> None:
    scores = (0.0, -1.0)
    assert search.can_rank(rows_of(scores, 8), 8)
    assert not search.can_rank(rows_of(scores, 9), 8)
    changes: list[dict[str, Any]] = [
        {"banned": (3,)},
        {"rules": Rules(bad_words=((3,),)), "history": History([5], 1)},
        {"forced": (3,)},
        {"logprobs": 0},
    ]
    for change in changes:
        other = SampleRow()._replace(**change)
        assert not search.can_rank(rows_of(scores, 8, SampleRow(), other), 8)


@pytest.fixture
def tags(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs that the emulator runs, and `host` for each ranking that it leaves to the host."""
    pytest.importorskip("torch_xla", reason="the emulator needs torch-xla: see `make test-neuron`")
    pytest.importorskip("jaxlib", reason="the emulator needs jaxlib: see `make test-neuron`")
    from lmi_multi.backends.neuron import executor
    from lmi_multi.backends.neuron.emulator import EmulatorProgram

    found: list[str] = []
    real, by_host = EmulatorProgram.run, executor.draw_by_row

    def noted(self: EmulatorProgram, tag: str, **inputs: Tensor) -> list[Tensor]:
        found.append(tag)
        return real(self, tag, **inputs)

    def drawn(logits: Tensor, rows: list[Row]) -> Any:
        found.append("host")
        return by_host(logits, rows)

    monkeypatch.setattr(EmulatorProgram, "run", noted)
    monkeypatch.setattr(executor, "draw_by_row", drawn)
    monkeypatch.setenv("LMI_MULTI_NEURON_RUNTIME", "emulator")
    monkeypatch.setenv("LMI_MULTI_NEURON_BUCKETS", "rows=8 queries=16,64")
    return found


@pytest.mark.parametrize(
    ("family", "degree"), [("t5", n) for n in DEGREES] + [("gpt2", 2), ("llama", 8)]
)
def test_searches_give_the_answers_of_the_cpu(
    family: str, degree: int, checkpoints: Path, tags: list[str]
) -> None:
    """Two searches at once beside a greedy answer; beams part within blocks, and a bucket of the
    context is crossed."""
    prompts = [ids(n, n) for n in (11, 3, 16)]
    options: list[dict[str, Any]] = [{"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 2}]
    folder, results = artifact(family, checkpoints).folder, []
    for backend, ranks in (("cpu", 1), ("neuron", degree)):
        sizes = {"tensor_parallel": ranks, "max_batch": 8, "max_tokens": 64}
        with load(folder, backend=backend, **sizes) as model:
            found = model.generate(prompts, [*options, {}], max_new_tokens=40, ignore_eos=True)
            results.append([(c.token_ids, c.score) for c in found])
    theirs, mine = results
    assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in theirs]
    scores = [[score for _, score in result if score is not None] for result in results]
    assert len(scores[0]) == 3
    torch.testing.assert_close(*map(torch.tensor, scores), atol=1e-5, rtol=0)
    crossed = {tag.split("_")[3] for tag in tags if tag.endswith("_beams")}
    assert crossed == {"32", "64"}
    # Only a decoder's prompt, one long row, is ranked by the host: once for each search.
    assert tags.count("host") == (0 if family == "t5" else 2)
