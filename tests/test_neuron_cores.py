"""What the emulator shows, shown on NeuronCores: for the first person who has some.

A tiny model's graphs are compiled for real, so this takes long. Nothing of it has run yet: see the
checklist in docs/neuron.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lmi_multi import backends, load
from lmi_multi.backends.base import Executor
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.engine.batch import Prompt
from tests.neuron_models import LARGEST_ERROR, WIDE, artifact, batches, ids, on_cpu

pytestmark = [pytest.mark.neuron, pytest.mark.timeout(7200)]

SIZES: dict[str, Any] = {"max_batch": 4, "max_tokens": 64}
BUCKETS = "rows=4 queries=64"  # few graphs, but two contexts


@pytest.fixture(autouse=True)
def _available(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmi_multi.backends.neuron import devices, environment, runtimes

    state = backends.probe("neuron")
    if not state.ok or runtimes.choose() != "nxd":
        pytest.skip(f"neuron: {state.reason if not state.ok else 'these cores are not nxd'}")
    monkeypatch.setenv("LMI_MULTI_NEURON_BUCKETS", BUCKETS)
    # A process takes cores once, and these tests load at several degrees.
    if environment.CORES not in os.environ:
        free = [core.index for core in devices.look().free]
        monkeypatch.setenv(environment.CORES, environment.spans(free))


def opened(source: Artifact, degree: int) -> Executor:
    return backends.get("neuron").load(source, tensor_parallel=degree, **SIZES)


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("family", WIDE)
def test_logits_are_those_of_the_cpu(
    family: str, degree: int, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "bert":
        monkeypatch.delenv("LMI_MULTI_NEURON_BUCKETS")
    source = artifact(family, checkpoints)
    cpu, ours = on_cpu(source), opened(source, degree)
    if family == "bert":
        prompts = [Prompt(ids(n, n), [i % 2 for i in range(n)]) for n in (11, 40)]
        worst = (ours.encode(prompts)[0] - cpu.encode(prompts)[0]).abs().max().item()
    else:
        worst = max(
            (ours.logits(batch) - cpu.logits(batch)).abs().max().item()
            for batch in batches(source.spec.kind)
        )
    print(f"{family} TP {degree}: {worst:.1e}")
    ours.close()
    assert worst <= LARGEST_ERROR


OPTIONS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3},
    {"do_sample": True, "top_k": 0, "seed": 4, "num_return_sequences": 4},
    {"num_beams": 4, "num_return_sequences": 2},
    {"repetition_penalty": 1.3, "logprobs": 2},
]


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_answers_are_those_of_the_cpu(family: str, checkpoints: Path) -> None:
    """More prompts than rows; the last draws are many, as sums of integers must be exact."""
    folder = artifact(family, checkpoints).folder
    prompts = [ids(n, n) for n in (11, 3, 20, 7, 1)]
    with (
        load(folder, backend="cpu", **SIZES) as cpu,
        load(folder, backend="neuron", tensor_parallel=2, **SIZES) as ours,
    ):
        for options in OPTIONS:
            theirs, mine = (
                [
                    completion.token_ids
                    for completion in model.generate(prompts, max_new_tokens=32, **options)
                ]
                for model in (cpu, ours)
            )
            assert mine == theirs, options


def test_the_state_starts_as_zeros_and_can_be_reset(checkpoints: Path) -> None:
    source = artifact("gpt2", checkpoints)
    ours: Any = opened(source, 2)
    batch = batches("decoder")[0]
    first = ours.logits(batch)
    ours._program.reset_state()
    assert ours.logits(batch).equal(first)
    ours.close()


def test_loading_finds_what_was_compiled_ahead(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process must trace the same graphs, so what compiles is one."""
    import subprocess
    import sys

    from lmi_multi.backends.neuron import devices
    from lmi_multi.backends.neuron.nxd import NxdBuilder

    monkeypatch.setenv("LMI_MULTI_NEURON_CACHE", str(tmp_path))
    folder = artifact("gpt2", checkpoints).folder
    sizes = ["--tensor-parallel", "2", "--max-batch", "4", "--max-tokens", "64"]
    command = [sys.executable, "-m", "lmi_multi", "compile", str(folder), *sizes]
    subprocess.run([*command, "--instance", str(devices.instance_type())], check=True)

    def compiles(self: NxdBuilder, graph: Any) -> bytes:
        raise AssertionError(f"{graph.tag} is compiled again")

    monkeypatch.setattr(NxdBuilder, "compile", compiles)
    with load(folder, backend="neuron", tensor_parallel=2, **SIZES) as ours:
        assert ours.generate([ids(3, 1)], max_new_tokens=4, ignore_eos=True)
