"""What ranks take part in beside steps of rows: steps begun ahead that are known at a glance, large
steps of prompts, and known tokens. Two processes, as in test_cuda_together.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lmi_multi.backends.cuda.ahead import Flight

from lmi_multi.engine.batch import Row
from lmi_multi.model import Model
from lmi_multi.parallel.local import LocalRanks
from tests import test_cuda_together, tiny_models
from tests.matrix import SharedRanks
from tests.test_cuda_graphs import LIMITS, cpu_model, prompts
from tests.test_cuda_together import no_memory

IDLE = replace(LIMITS, max_idle_tokens=192)


class Shelf(test_cuda_together.Shelf):
    """As there, with room for large steps; it counts the steps that were known at a glance."""

    limits = IDLE

    def open(
        self, folder: Path, trouble: Callable[[test_cuda_together.Shelf], None] | None = None
    ) -> None:
        super().open(folder, trouble)
        self.glances = 0

        def is_of(own: Flight, rows: Sequence[Row], real: Any = Flight.is_of) -> bool:
            found: bool = real(own, rows)
            self.glances += found
            return found

        self.patch.setattr(Flight, "is_of", is_of)

    def known(self) -> list[int]:
        """Of every rank: how many steps were known at a glance."""
        return self.gathered(self.glances)

    def graphs(self) -> list[Any]:
        """Of every rank: whether it has the graphs of prefills that were wanted, by their sizes."""
        assert self.executor is not None and self.executor._prefill_graphs is not None
        captured = self.executor._prefill_graphs._captured
        return self.gathered({size: made is not None for (_, size, _), made in captured.items()})


@pytest.fixture(scope="module")
def two() -> Iterator[LocalRanks]:
    opened = LocalRanks(2, Shelf)
    yield opened
    opened.close()


def open_model(ranks: LocalRanks, checkpoints: Path, family: str) -> Model:
    artifact = tiny_models.artifact(checkpoints, family)
    return Model(artifact, "cuda", SharedRanks(ranks, artifact.folder, IDLE))


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "seed": 3}], ids=["greedy", "sampled"])
def test_steps_are_known_at_a_glance(
    two: LocalRanks, checkpoints: Path, sampled: dict[str, Any]
) -> None:
    """Though rows that have come through a pipe are none of the objects that they were."""
    with open_model(two, checkpoints, "gpt2") as model:
        model.generate(prompts(5, 2), max_new_tokens=12, ignore_eos=True, **sampled)
        assert two.call("known") == [11, 11]


@pytest.mark.parametrize("numbers", [None, (5,), (6,)])
@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_large_steps_of_prompts(
    two: LocalRanks, checkpoints: Path, family: str, numbers: tuple[int, ...] | None
) -> None:
    """More tokens than a step beside rows that run has: captured on both, or, where one has no room
    for that size, on neither. The first four captures are of steps that are tried at once."""
    own = [(tokens * 20)[:20] for tokens in prompts(9, 4)]
    with cpu_model(checkpoints, family) as cpu:
        expected = [c.token_ids for c in cpu.generate(own, max_new_tokens=4)]
    with open_model(two, checkpoints, family) as model:
        if numbers is not None:
            two.call("open", tiny_models.artifact(checkpoints, family).folder, no_memory(*numbers))
        assert [c.token_ids for c in model.generate(own, max_new_tokens=4)] == expected
        assert two.call("graphs") == [{192: numbers is None}] * 2


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_known_tokens(two: LocalRanks, checkpoints: Path, family: str) -> None:
    texts, answers = prompts(5, 9), [[3, 4, 5], [6], [7, 8], [9] * 7, [10]]
    with cpu_model(checkpoints, family) as cpu, open_model(two, checkpoints, family) as model:
        expected = cpu.score(texts, answers)
        for own, other in zip(model.score(texts, answers), expected, strict=True):
            assert own == pytest.approx(other, abs=2e-5)
