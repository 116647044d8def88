"""The `nxd` runtime on neuronx-distributed's own sources, over stand-ins for the closed parts.

`make test-neuron-sources NXD=CHECKOUT` runs it, with a checkout of the public repository at a
release of SDK 2.28 to 2.31, in a process of its own, whose packages for Neuron are stand-ins.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lmi_multi.backends.neuron import buckets

from lmi_multi import load
from lmi_multi.engine.batch import Prompt
from lmi_multi.instances import find
from lmi_multi.model import Model
from tests import nxd_closed_parts as closed
from tests.neuron_libraries import parameters, real, signatures
from tests.neuron_models import (
    DEGREES,
    LARGEST_ERROR,
    LIMITS,
    WIDE,
    artifact,
    batches,
    ids,
    on_cpu,
)
from tests.test_neuron_emulator import OPTIONS
from tests.test_neuron_nxd_emulated import OPTIONS as BY_GRAPHS

SOURCES = os.environ.get("LMI_MULTI_NXD_SOURCES")
if not SOURCES:
    pytest.skip(
        "needs sources of neuronx-distributed: see `make test-neuron-sources`",
        allow_module_level=True,
    )

closed.install(Path(SOURCES) / "src")


def opened(family: str, degree: int, folder: Path) -> Any:
    from lmi_multi.backends.neuron.loading import open_executor
    from lmi_multi.backends.neuron.nxd import NxdRuntime

    runtime = NxdRuntime(find("inf2.48xlarge"))
    return open_executor(artifact(family, folder), degree, LIMITS, runtime)


def test_the_sources_are_the_checkout() -> None:
    import neuronx_distributed

    assert Path(neuronx_distributed.__file__).is_relative_to(Path(SOURCES).resolve())


@pytest.mark.parametrize("name", signatures("neuronx_distributed"))
def test_signatures_are_those_of_the_sources(name: str) -> None:
    ours, theirs = signatures("neuronx_distributed")[name], real("neuronx_distributed", name)
    assert parameters(theirs) == parameters(ours)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("family", WIDE)
def test_logits_are_those_of_the_cpu(
    family: str, degree: int, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "MOST_VOCAB", 0)  # graphs that draw take long to compile
    if family != "bert":
        monkeypatch.setenv("LMI_MULTI_NEURON_BUCKETS", "rows=4 queries=32")
    cpu, ours = on_cpu(artifact(family, checkpoints)), opened(family, degree, checkpoints)
    if family == "bert":
        prompts = [Prompt(ids(n, n), [i % 2 for i in range(n)]) for n in (11, 40)]
        (mine, pooled), (theirs, expected) = ours.encode(prompts), cpu.encode(prompts)
        worst = max((mine - theirs).abs().max().item(), (pooled - expected).abs().max().item())
    else:
        kind = artifact(family, checkpoints).spec.kind
        worst = max(
            (ours.logits(batch) - cpu.logits(batch)).abs().max().item() for batch in batches(kind)
        )
    print(f"{family} TP {degree}: {worst:.1e}")
    assert worst <= LARGEST_ERROR
    assert "--target=inf2" in closed.FLAGS[-1]
    ours.close()


@pytest.fixture(params=["gpt2", "t5"])
def models(
    request: pytest.FixtureRequest, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Model, Model]]:
    monkeypatch.setenv("LMI_MULTI_NEURON_BUCKETS", "rows=4 queries=32")
    source = artifact(request.param, checkpoints)
    with (
        Model(source, "cpu", on_cpu(source)) as cpu,
        Model(source, "neuron", opened(request.param, 2, checkpoints)) as ours,
    ):
        yield cpu, ours


def test_answers_are_those_of_the_cpu(models: tuple[Model, Model]) -> None:
    """More prompts than rows, every kind of option; beams copy the state's blocks."""
    cpu, ours = models
    prompts = [ids(11, 1), ids(25, 9), ids(3, 2), ids(20, 3), ids(1, 4)]
    for options in [*BY_GRAPHS.values(), *OPTIONS]:
        mine, theirs = (
            [c.token_ids for c in model.generate(prompts, max_new_tokens=32, **options)]
            for model in (ours, cpu)
        )
        assert mine == theirs, options


def test_the_state_starts_as_zeros_and_can_be_reset(checkpoints: Path) -> None:
    ours = opened("gpt2", 2, checkpoints)
    program, batch = ours._program, batches("decoder")[0]

    def state() -> list[torch.Tensor]:
        model = program._model
        return [model.read_from_neuron_buffer("v1", rank) for rank in range(2)]

    assert not any(held.any() for held in state())
    first = ours.logits(batch)
    assert all(held.any() for held in state())
    program.reset_state()
    assert not any(held.any() for held in state())
    assert torch.equal(ours.logits(batch), first)


def test_loading_finds_what_was_compiled_ahead(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmi_multi.backends.neuron import BACKEND, devices, sdk

    cores = [devices.Core(i, 0, 16 * 2**30) for i in range(2)]
    host = devices.Host(("/dev/neuron0",), "inf2.xlarge", cores)
    packages = {"neuronx-cc": "2.24", "torch-neuronx": "2.9.0", "neuronx-distributed": "0.18"}
    monkeypatch.setattr(devices, "look", lambda: host)
    monkeypatch.setattr(sdk, "installed", lambda: sdk.Sdk(packages))
    own = {"LMI_MULTI_NEURON_CACHE": str(tmp_path), "LMI_MULTI_NEURON_INSTANCE": "inf2.xlarge"}
    monkeypatch.setattr(os, "environ", os.environ | own)
    source = artifact("gpt2", checkpoints)
    sizes: dict[str, Any] = {"tensor_parallel": 2, "max_batch": 2, "max_tokens": 32}
    before = len(closed.FLAGS)
    done = BACKEND.compile(source, instance="inf2.xlarge", **sizes)
    assert done.count.done == len(closed.FLAGS) - before == len([*tmp_path.rglob("*.graph")])
    with (
        load(source.folder, backend="cpu", max_tokens=32) as cpu,
        load(source.folder, backend="neuron", **sizes) as ours,
    ):
        assert len(closed.FLAGS) - before == done.count.done
        assert ours.device == "2 NeuronCores"
        prompts = [ids(11, 1), ids(3, 2), ids(20, 3)]
        mine, theirs = (
            [c.token_ids for c in m.generate(prompts, max_new_tokens=8)] for m in (ours, cpu)
        )
    assert mine == theirs
    assert os.environ["NEURON_RT_VISIBLE_CORES"] == "0-1"
