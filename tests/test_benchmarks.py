"""The benchmarks of GPUs on tiny shapes, with everything that needs a GPU stood in for: that they
run, and that each contender is what it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lmi_multi.backends.cuda import draws, executor, graphs
from lmi_multi.backends.cuda.beams import BeamKind
from lmi_multi.backends.cuda.ops import Scratch
from safetensors.torch import load_file

from benchmarks import (
    bench_command,
    generate,
    memory,
    newcomers,
    prefill,
    random_model,
    sampled,
    steps,
)
from benchmarks.peers import Task
from benchmarks.static_cache import STATIC
from lmi_multi.parallel.collectives import SingleRank
from tests import prefill_kernel
from tests.cuda_stand_ins import Programs, stand_in
from tests.test_cuda_ahead import open_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> Programs:
    return stand_in(monkeypatch)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("shape", ["tiny-t5", "tiny-gpt2"])
def test_steps(monkeypatch: pytest.MonkeyPatch, shape: str, beams: int) -> None:
    """Every step after the first has as many rows as it says."""
    step, rows = executor.CudaExecutor.step, []

    def noted(self: executor.CudaExecutor, batch: Any) -> Any:
        rows.append(len(batch.rows))
        return step(self, batch)

    monkeypatch.setattr(executor.CudaExecutor, "step", noted)
    task = Task(shape, "fp32", [2, 4], 9, 5, 1, CPU)
    peers = [STATIC] if beams == 1 else []
    timings = chain(steps._ours(task, None, beams, True, None), steps._theirs(task, peers))
    found = [(who, timing.rows) for who, timing in timings]
    searched = f", {beams} beams" if beams > 1 else ""
    names = [f"lmi_multi{searched}", f"lmi_multi, uncaptured{searched}"]
    expected = [*names, *(peer.label for peer in peers)]
    assert found == [(name, count) for name in expected for count in (2, 4)]
    for count in (2, 4):
        first = count // beams
        runs = [first, first, *[count] * 4, first, first, *[count] * 4]
        assert rows[: len(runs)] == runs
        del rows[: len(runs)]


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_the_bench_command(tmp_path: Path, quantize: Any) -> None:
    """It loads an artifact whose weights are numbers, no longer a hole, and times all rows."""
    task = Task("tiny-t5", "bf16", [2, 4], 9, 5, 1, CPU, tmp_path)
    for name, tensor in load_file(bench_command._write(task, quantize, tmp_path)).items():
        assert tensor.float().abs().max() > 0, name
    timings = list(bench_command.bench_timings(task, quantize))
    assert [timing.rows for timing in timings] == [2, 4]
    for timing in timings:  # of one round, whose times say little on a busy machine
        assert timing.first > 0 and timing.whole > 0
        assert timing.step == pytest.approx((timing.whole - timing.first) / 4)


def test_what_ends_the_bench_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    task = Task("tiny-gpt2", "bf16", [1], 2000, 5, 1, CPU, tmp_path)
    with pytest.raises(SystemExit, match="`lmi-multi bench` of tiny-gpt2 ended with 2"):
        list(bench_command.bench_timings(task, None))
    assert "max_tokens is 2005, but the model's positions end at 1024" in capfd.readouterr().err
    full = OSError(28, "No space left on device")

    def write(*given: Any) -> None:
        raise full

    monkeypatch.setattr(bench_command, "_write", write)
    with pytest.raises(SystemExit, match=r"tiny-gpt2 cannot be written to .*: No space left"):
        list(bench_command.bench_timings(task, None))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", ["tiny-t5", "tiny-gpt2"])
def test_prefill(monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    """All contenders compute the same, the one in plain torch without our kernels."""
    calls: list[str] = []

    def kernel(*given: Any) -> bool:
        calls.append("kernel")
        return prefill_kernel.prefill(*given)

    monkeypatch.setattr(torch.ops.lmi_multi, "prefill", kernel)
    found: dict[str, Any] = {}

    def once(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
        for name, run in runs.items():
            calls.clear()
            found[name] = run()
            assert ("kernel" in calls) == (name != "torch")
        return {name: [4.0, 1.0, 2.0 + ("torch" in name)] for name in runs}

    monkeypatch.setattr(prefill, "time_runs", once)
    with torch.inference_mode():
        cases = [*prefill.models(shape, "fp32", [1, 3], 20, 1, CPU)]
    assert [(case.rows, case.beside) for case in cases] == [(1, 1.5), (3, 1.5)]
    assert f"| {shape} | fp32 | 3 x 20 | 2.000 | 2.000 | 3.000 |" in prefill._page("", cases, 3)
    if shape == "tiny-gpt2":
        for name in ("captured", "kernels"):
            torch.testing.assert_close(found[name], found["torch"])


@pytest.mark.parametrize("shape", ["tiny-t5", "tiny-gpt2"])
def test_sampled(shape: str) -> None:
    """All kinds of options, each with an answer of the length that is timed."""
    cases = [*sampled.cases(shape, "fp32", [1, 2], 6, 1, CPU)]
    assert [(case.rows, case.options) for case in cases] == [
        (rows, kind) for rows in (1, 2) for kind in sampled.OPTIONS
    ]
    page = sampled._page("a command", cases, 6)
    assert f"| options | {shape}, 1 | {shape}, 2 |" in page
    assert all(f"\n| {kind} | " in page for kind in sampled.OPTIONS)


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_memory_makes_every_graph(tmp_path: Path, family: str) -> None:
    """Steps of every number of rows that end with logits and with tokens, drawn or chosen; searches
    where rows can be of one; and prefills of all sizes that are captured."""
    model = open_model(tmp_path, family)
    own: Any = model.engine.executor
    memory.make_graphs(model)
    rows = graphs.sizes(model.limits.max_batch)
    fed, ahead = own._fed._captured, own._ahead._graphs._captured
    assert {size for size, kind in fed if kind is None} == set(rows)
    assert {size for size, kind in fed if isinstance(kind, BeamKind)} == {
        size for size in rows if size % 4 == 0
    }
    for kind in {kind for _, kind in ahead}:
        assert {size for size, other in ahead if other == kind} == set(rows)
    assert {kind for _, kind in ahead} == {draws.GREEDY, draws.FUSED}
    made = own._prefill_graphs
    prefills = {size for _, size, _ in made._captured}
    assert prefills >= {size for size in made.sizes if size < model.limits.max_tokens}
    memory.fill(model)
    model.close()


def test_generate_and_newcomers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By captured steps and prefills, which run ahead: every row gets its tokens."""

    def opened(spec: Any, tensors: Any, limits: Any, device: torch.device) -> Any:
        scratch = Scratch(device, limits.max_batch * spec.heads)
        made = executor.CudaExecutor(spec, tensors, limits, scratch, SingleRank())
        assert made._ahead is not None and made._prefill_graphs is not None
        return made

    monkeypatch.setattr(random_model, "_executor", opened)
    for shape in ("tiny-t5", "tiny-gpt2"):
        cases = list(generate.measure(shape, "fp32", None, CPU, [1, 3], 20, 8, 32, 64, 2))
        assert [case.rows for case in cases] == [1, 3]
        load = newcomers.Load(rows=3, prompt=5, newcomers=2, long=70)
        case = newcomers.measure(shape, "fp32", None, CPU, load, 40, 1)
        # The last newcomer's last token is a row of the step behind its prefill.
        assert case.steps == (3 if shape == "tiny-t5" else 5)
