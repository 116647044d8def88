"""The `transformers_neuronx` runtime: its checkpoints, its calls, and answers like the CPU's.

The library is its stand-in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lmi_multi.backends.neuron import (
    environment,
    transformers_neuronx,
    transformers_neuronx_export,
)
from lmi_multi.backends.neuron.transformers_neuronx_export import exported
from lmi_multi.backends.neuron.transformers_neuronx_ports import PORTS, find_port
from safetensors.torch import load_file
from torch import Tensor

from lmi_multi import load
from lmi_multi.backends.ahead_of_time import Compilation
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.engine.batch import Batch, Row
from lmi_multi.errors import BackendError, CapacityError, CheckpointError, OptionError
from lmi_multi.model import Model
from lmi_multi.ops.sampling import SampleRow
from tests import tiny_models
from tests.families import FAMILIES, Tiny
from tests.neuron_libraries import Library
from tests.transformers_neuronx_stand_in import MANY, NEFFS, RUN, artifact, stand_in

GIB = 2**30


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = stand_in()
    found.install(monkeypatch)
    monkeypatch.setattr(environment, "take_cores", lambda count: None)
    monkeypatch.setenv("NEURON_CC_FLAGS", environment.COMPILER_FLAGS)
    return found


def opened(source: Artifact, degree: int = 2, **sizes: Any) -> Any:
    given = {"memory": GIB, "max_batch": None, "max_tokens": 64, **sizes}
    return transformers_neuronx.open_executor(source, degree, **given)


@pytest.mark.parametrize("family", RUN)
def test_the_checkpoint_is_that_which_was_converted(family: str, checkpoints: Path) -> None:
    source = artifact(family, checkpoints)
    folder = exported(source, find_port(source))
    assert exported(source, find_port(source)) == folder
    ours: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        ours |= load_file(file)
    theirs = load_file(checkpoints / f"tnx-{family}-hf" / "model.safetensors")
    base = {name.removeprefix("transformer.").removeprefix("model.") for name in theirs}
    assert base <= {name.removeprefix("transformer.").removeprefix("model.") for name in ours}
    for name, tensor in theirs.items():
        if name == "model.decoder.embed_positions.weight":
            assert torch.equal(ours[name][2:], tensor[2:])  # the first two rows are never used
        else:
            assert torch.equal(ours[name], tensor), name
    ties = set(ours) - set(theirs)
    assert ties <= {"lm_head.weight"}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3},
    {"repetition_penalty": 1.3, "logprobs": 2},
]


@pytest.mark.parametrize("family", RUN)
def test_answers_are_those_of_the_cpu(family: str, checkpoints: Path, library: Library) -> None:
    """More prompts than rows, of several lengths, one of a single token."""
    source = artifact(family, checkpoints)
    prompts = [[5, 6, 7, 8, 9], [11], list(range(3, 40)), [20, 21], [30, 31, 32]]
    with (
        load(source.folder, backend="cpu", max_batch=4, max_tokens=64) as cpu,
        Model(source, "neuron", opened(source, max_batch=3 if family in MANY else None)) as ours,
    ):
        assert ours.limits.max_batch == (3 if family in MANY else 1)
        for options in OPTIONS:
            mine, theirs = (
                [c.token_ids for c in m.generate(prompts, max_new_tokens=12, **options)]
                for m in (ours, cpu)
            )
            assert mine == theirs, options
    made = {call.name: call.arguments for call in library.calls}
    port = find_port(source)
    settings = next(v for k, v in made.items() if k.endswith(f"{port.name}.__init__"))
    given = {**settings, **settings.get("kwargs", {})}
    assert (given["tp_degree"], given["amp"]) == (2, "f32")
    assert given["n_positions"] == ([64] if port.continuous else 64)
    assert ("context_length_estimate" in given) == (family not in ("gptj", "gptneox"))
    if port.continuous:
        rows = given["neuron_config"].given["continuous_batching"]
        assert rows.given == {"batch_size_for_shared_caches": 3}
    assert any(name.endswith(".to_neuron") for name in made)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logits_and_rows_in_slices(family: str, checkpoints: Path, library: Library) -> None:
    source = artifact(family, checkpoints)
    ours, cpu = opened(source), tiny_models.executor(source, block_size=64, blocks=4)
    rows = [Row([5, 6, 7, 8], 0, [0], 4)]
    rows += [Row([9, 3], 0, [2], 2)] if family in MANY else []
    torch.testing.assert_close(ours.logits(Batch(rows)), cpu.logits(Batch(rows)), atol=1e-4, rtol=0)
    later = Batch([Row([9, 4, 2], 4, [0], 7, sample=SampleRow())])
    assert ours.step(later).draws == cpu.step(later).draws
    ours.close()
    ours.close()


def test_a_row_that_is_not_named_keeps_its_tokens(checkpoints: Path, library: Library) -> None:
    source = artifact("llama", checkpoints)
    ours, cpu = opened(source), tiny_models.executor(source, block_size=64, blocks=4)
    first, second = [5, 6, 7], [8]
    for executor in (ours, cpu):
        executor.step(Batch([Row(first, 0, [1], 3), Row(second, 0, [3], 1)]))
        executor.step(Batch([Row([9], 1, [3], 1)]))  # row 1 takes no part
    last = Batch([Row([4], 3, [1], 3, sample=SampleRow())])
    assert ours.step(last).draws == cpu.step(last).draws


@pytest.mark.parametrize(
    ("family", "tiny", "fault"),
    [
        ("t5", FAMILIES["t5"], "does not run the family t5; it runs gpt2, opt, bloom, gptj"),
        ("qwen3", FAMILIES["qwen3"], "it does not have .*k_norm.weight"),
        ("opt-350m", FAMILIES["opt-350m"], "embed_dim is 32, it runs 48; block is 'post'"),
        ("gptneox-gelu", FAMILIES["gptneox"], "activation is 'gelu', it runs 'gelu_tanh'"),
        ("llama-yarn", FAMILIES["llama-yarn-rope"], "position is Rope.*yarn"),
        ("llama-biased", FAMILIES["llama-mqa-biased-tied"], "does not have .*qkv.bias"),
        ("gpt2-scale", FAMILIES["gpt2-inverse-scale"], "inverse_layer_scale is True"),
        ("qwen2-window", FAMILIES["qwen2-window"], "windows is .0, 6"),
        ("opt-unbiased", FAMILIES["opt-unbiased"], "it needs decoder.0.norm1.bias|needs"),
    ],
)
def test_networks_that_it_cannot_run_are_refused_by_name(
    family: str, tiny: Tiny, fault: str, checkpoints: Path, library: Library
) -> None:
    with pytest.raises(BackendError, match=f"transformers-neuronx .*{fault}"):
        opened(artifact(family, checkpoints, tiny))
    assert not library.calls


def test_options_that_it_cannot_carry_are_refused_by_name(
    checkpoints: Path, library: Library
) -> None:
    gpt2, llama = artifact("gpt2", checkpoints), artifact("llama", checkpoints)
    with pytest.raises(OptionError, match=r"max_batch is 2, but .* runs gpt2 one row at a time"):
        opened(gpt2, max_batch=2)
    with pytest.raises(CapacityError, match=r"max_batch is 4, but .* memory holds 2 rows"):
        opened(llama, max_batch=4, memory=40_000)
    int8 = artifact("llama-int8", checkpoints, RUN["llama"], quantize="int8")
    with pytest.raises(BackendError, match="cannot run this model: quantize is 'int8', it runs No"):
        opened(int8)
    with Model(llama, "neuron", opened(llama)) as model:
        with pytest.raises(OptionError, match="prompt 0: num_beams is 2; allowed: 1"):
            model.generate([[5]], num_beams=2)
        with pytest.raises(BackendError, match="score and prompt_logprobs need the logits"):
            model.score([[5]], [[6]])
        with pytest.raises(BackendError, match="encode and embed need hidden states"):
            model.embed([[5]])
        with pytest.raises(BackendError, match="prompt_logprobs"):
            model.generate([[5, 6]], max_new_tokens=2, prompt_logprobs=True)


AHEAD: dict[str, Any] = {"memory": GIB, "max_batch": None, "max_tokens": 64}


def compiled(source: Artifact, where: Path | None = None, jobs: int | None = None) -> Compilation:
    given = {**AHEAD, "where": where, "jobs": jobs}
    return transformers_neuronx.compile_ahead_of_time(source, 2, **given)


def last_calls(library: Library) -> list[str]:
    """Of the library's model, by name, since this was last asked."""
    names = [name.rpartition(".")[2] for name in library.names()]
    library.calls.clear()
    return [name for name in names if name in ("cpu_compile", "load", "to_neuron", "save")]


@pytest.mark.parametrize("family", [name for name, port in PORTS.items() if port.reads_prompts])
def test_graphs_compiled_ahead_are_found(
    family: str, checkpoints: Path, library: Library, tmp_path: Path
) -> None:
    source = artifact(family, checkpoints)
    made = compiled(source, tmp_path, jobs=3)
    assert (made.count.total, made.count.hits) == (2, 0)
    assert [path.parent for path in tmp_path.glob("*/*")] == [Path(made.place)]
    given = next(c.arguments for c in library.calls if c.name.endswith("NeuronConfig.__init__"))
    assert given["compilation_worker_count"] == 3
    assert last_calls(library) == ["cpu_compile", "save"]
    assert compiled(source, tmp_path).count.hits == 2
    assert last_calls(library) == []


def test_loading_compiles_nothing_that_the_cache_has(
    checkpoints: Path,
    library: Library,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("LMI_MULTI_NEURON_CACHE", str(tmp_path))
    caplog.set_level("INFO")
    source = artifact("llama", checkpoints)
    opened(source)
    assert last_calls(library) == ["to_neuron", "save"]
    assert "graphs are not cached and compiled now" in caplog.text
    opened(source)
    assert last_calls(library) == ["load", "to_neuron"]
    # Graphs that another release of the library builds have other names.
    monkeypatch.setitem(NEFFS, "89ab.neff", b"new")
    opened(source)
    assert last_calls(library) == ["load", "to_neuron", "to_neuron", "save"]
    [entry] = tmp_path.glob("*/*")
    assert f"{entry} has other graphs than transformers-neuronx builds: not used" in caplog.text
    assert compiled(source).count.total == 3
    caplog.clear()
    monkeypatch.setenv("NEURON_CC_FLAGS", "-O3")
    opened(source)
    assert last_calls(library) == ["to_neuron", "save"]
    assert f"{entry} has the flags '{environment.COMPILER_FLAGS}', not '-O3': not us" in caplog.text


def test_families_that_compile_only_when_they_load(checkpoints: Path, library: Library) -> None:
    for family in ("gptj", "gptneox"):
        with pytest.raises(BackendError, match=f"compiles {family} only when .*COMPILE_CACHE_URL"):
            compiled(artifact(family, checkpoints))
        opened(artifact(family, checkpoints))  # keeps nothing itself


def test_faults_of_the_compiler_leave_nothing(
    checkpoints: Path, library: Library, tmp_path: Path
) -> None:
    def fails(self: Any) -> None:
        raise RuntimeError("neuronx-cc failed with 70")

    library.behaviours["base.NeuronModelBase.cpu_compile"] = fails
    with pytest.raises(BackendError, match=r"cannot compile .*gpt2-.*neuronx-cc failed with 70"):
        compiled(artifact("gpt2", checkpoints), tmp_path)
    assert not list(tmp_path.iterdir())


def test_memory_bounds_the_rows_that_are_chosen(checkpoints: Path) -> None:
    source = artifact("llama", checkpoints)
    port = find_port(source)
    plan = transformers_neuronx.plan_rows(source, port, 2, 40_000, None, 64)
    assert (plan.max_batch, plan.blocks, plan.block_size) == (2, 2, 64)
    assert plan.max_step_tokens == 128
    assert not plan.beams
    everything = transformers_neuronx.plan_rows(source, port, 2, GIB, None, None)
    assert everything.max_tokens == 128
    assert everything.max_batch == transformers_neuronx.DEFAULT_ROWS


def test_a_changed_artifact_gets_a_checkpoint_of_its_own(checkpoints: Path) -> None:
    source = artifact("gpt2", checkpoints)
    other = artifact("gpt2-again", checkpoints, RUN["gpt2"], dtype="bf16")
    port = find_port(source)
    assert exported(source, port) != exported(other, port)
    kept = load_file(exported(other, port) / "model-ends.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}


def test_faults_of_the_library_and_of_the_disk(
    checkpoints: Path, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any) -> None:
        raise RuntimeError("neuronx-cc failed with 70")

    source = artifact("gpt2", checkpoints)
    library.behaviours["base.NeuronModelBase.to_neuron"] = fails
    with pytest.raises(BackendError, match=r"cannot load .*gpt2-.*neuronx-cc failed with 70"):
        opened(source)

    def full(*given: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers_neuronx_export, "save_file", full)
    monkeypatch.setenv("LMI_MULTI_CACHE", str(checkpoints / "another"))
    with pytest.raises(CheckpointError, match="No space left on device; LMI_MULTI_CACHE names"):
        exported(source, find_port(source))
    [lock] = (checkpoints / "another" / "transformers-neuronx").iterdir()
    assert lock.suffix == ".lock"
