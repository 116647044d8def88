"""What closing leaves of the CUDA executor's graphs, with all that needs a GPU stood in for."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lmi_multi.backends.cuda import capturing, draws
from torch import Tensor

from lmi_multi.ops.sampling import SampleRow
from lmi_multi.parallel.collectives import SingleRank
from tests.test_cuda_ahead import open_model, programs  # noqa: F401


class Graph:
    """One that is never run."""


@pytest.mark.parametrize("family", ["t5", "llama-gqa"])
def test_every_graph_goes_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str
) -> None:
    """None is left to the garbage collector: NCCL's communicators wait for the end of every graph
    that holds a call of theirs."""
    made: list[weakref.ref[Any]] = []

    def capture(body: Callable[[], Tensor], *_: Any) -> capturing.Captured:
        graph: Any = Graph()
        made.append(weakref.ref(graph))
        return capturing.Captured(graph, body())

    monkeypatch.setattr(capturing, "capture", capture)
    monkeypatch.setattr(SingleRank, "alone", False)  # as several ranks do it: each is made twice
    gc.disable()
    try:
        opened: Any = open_model(tmp_path, family, program_rows=0).engine.executor
        with torch.inference_mode():
            sampled = opened._ahead._graphs.draws.kind([SampleRow(temperature=1.0)])
            for kind in (draws.GREEDY, sampled):
                assert opened._ahead._graphs.drawing(2, kind)
            assert opened._prefill_graphs._get("prompts" if family == "t5" else "rows", [3], [3])
        assert [graph() is not None for graph in made] == [False, True] * 5
        opened.close()
        assert not any(graph() for graph in made)
    finally:
        gc.enable()
