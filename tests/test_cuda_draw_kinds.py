"""By what captured steps draw: all options by one kernel, or, where that does not run, some by
torch's operations; with what needs a GPU stood in for as in test_cuda_ahead.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lmi_multi.backends.cuda import ahead, draws, fused_draws, graphs, inputs
from torch import Tensor

from lmi_multi.backends.base import Limits
from lmi_multi.engine.batch import Row
from lmi_multi.ops.sampling import SampleRow
from tests.cuda_stand_ins import stand_in
from tests.test_cuda_ahead import open_model
from tests.test_cuda_graphs import assert_same_as_cpu, cpu_model, prompts


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("most_vocab", [0, 1 << 18], ids=["by-torch", "by-kernel"])
@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_few_graphs_are_not_spent_where_no_step_follows(
    monkeypatch: pytest.MonkeyPatch, folder: Path, family: str, most_vocab: int
) -> None:
    """Answers of one token."""
    monkeypatch.setattr(graphs, "MOST_VOCAB", most_vocab)
    own = prompts(2, 7) if family == "t5" else [[3], [4]]
    with open_model(folder, family) as model:
        model.generate(own, max_new_tokens=1, do_sample=True, top_p=0.9)
        captured = model.engine.executor._ahead._graphs._captured  # type: ignore[attr-defined]
        assert {kind for _, kind in captured} <= {None, draws.GREEDY}


def refuse(*_: Tensor) -> bool:
    return False


def fail(*_: Tensor) -> bool:
    raise RuntimeError("launch: too many blocks in cooperative launch")


@pytest.mark.parametrize("draw", [refuse, fail])
def test_a_gpu_that_does_not_run_the_kernel_draws_by_torch(
    monkeypatch: pytest.MonkeyPatch, folder: Path, draw: Any
) -> None:
    monkeypatch.setattr(torch.ops.lmi_multi, "draw", draw)
    model = open_model(folder, "gpt2")
    assert model.engine.executor.limits.begins_ahead
    assert not model.engine.executor.limits.follows
    assert_same_as_cpu(folder, "gpt2", model)


def test_rows_whose_lists_find_no_room_leave_others_theirs(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    begun, replay = [], ahead.Ahead._replay

    def noted(self: ahead.Ahead, graph: Any, rows: Sequence[Row], *given: Any) -> Any:
        begun.append(len(rows))
        return replay(self, graph, rows, *given)

    monkeypatch.setattr(ahead.Ahead, "_replay", noted)
    monkeypatch.setattr(fused_draws, "MOST_LISTED", 40)
    large: dict[str, Any] = {"logit_bias": dict.fromkeys(range(30), 0.1)}
    own, shared = prompts(4, 1), {"suppress_tokens": list(range(9, 39))}
    with cpu_model(folder, "gpt2") as cpu, open_model(folder, "gpt2") as model:
        assert model.engine.executor.limits.follows
        for options, ahead_rows in (([{}, {}, {}, large], 3), ([shared] * 4, 4)):
            begun.clear()
            lengths = {"max_new_tokens": 20, "ignore_eos": True}
            chosen = [own | lengths for own in options]
            expected = [c.token_ids for c in cpu.generate(own, chosen)]
            assert [c.token_ids for c in model.generate(own, chosen)] == expected
            assert sum(begun) == 19 * ahead_rows


def test_every_row_finds_its_own_list() -> None:
    """More of them than are kept, some of them twice."""
    given = inputs.StepInputs(Limits(700, 16, 1, 700, 16), 700, False, torch.device("cpu"))
    made = fused_draws.FusedDraws(given)
    rows = [SampleRow(banned=(i % 400, i % 400 + 1, i % 400 % 7)) for i in range(700)]
    assert made.fitting(rows) == list(range(700))
    made.fill(rows)
    records = made._options.numpy().view(fused_draws.OPTIONS)[:, 0]
    for row, record in zip(rows, records, strict=True):
        begin = int(record["banned"])
        assert tuple(made._lists[begin : begin + int(record["bans"])].tolist()) == row.banned
    assert max(records["banned"]) == 3 * 399
    with pytest.raises(ValueError, match="no room for what row 1 lists"):
        made.fill([SampleRow(banned=tuple(range(n))) for n in (1 << 17, (1 << 17) + 1)])


def test_kinds_of_draw_are_bounded(
    monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where not all are one kernel's."""
    monkeypatch.setattr(graphs, "MOST_VOCAB", 0)
    monkeypatch.setattr(graphs, "MOST_CHOSEN", 2)
    own = prompts(3, 8)
    with cpu_model(folder, "gpt2") as cpu, open_model(folder, "gpt2") as model:
        for bans in (0, 1, 5, 9, 17):  # as many as no other, rounded up to powers of two
            chosen: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "seed": 1}
            chosen["suppress_tokens"] = list(range(20, 20 + bans))
            expected = [c.token_ids for c in cpu.generate(own, chosen)]
            assert [c.token_ids for c in model.generate(own, chosen)] == expected
        captured = model.engine.executor._ahead._graphs._captured  # type: ignore[attr-defined]
        assert len([kind for _, kind in captured if kind not in graphs.ALWAYS]) == 2
    assert caplog.text.count("there are 2 kinds of sampled steps: others run uncaptured") == 1


def test_one_graph_draws_by_all_options(folder: Path) -> None:
    own = prompts(3, 8)
    with cpu_model(folder, "gpt2") as cpu, open_model(folder, "gpt2") as model:
        every: list[dict[str, Any]] = [
            {"top_k": 5},
            {"top_p": 0.5},
            {"min_p": 0.1},
            {"typical_p": 0.5},
            {"suppress_tokens": list(range(9, 60))},
            {"repetition_penalty": 1.4},
            {"bad_words": [[5, 6], [7]]},
        ]
        for more in ({}, *every):
            chosen: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "seed": 1, **more}
            expected = [c.token_ids for c in cpu.generate(own, chosen)]
            assert [c.token_ids for c in model.generate(own, chosen)] == expected
        captured = model.engine.executor._ahead._graphs._captured  # type: ignore[attr-defined]
        assert {kind for _, kind in captured if kind != draws.GREEDY} == {draws.FUSED}
