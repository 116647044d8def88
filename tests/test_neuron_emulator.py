"""Static graphs on emulated cores beside the CPU backend: logits, tokens, and every option.

These need torch-xla and jaxlib: `make test-neuron` runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmi_multi import load
from lmi_multi.engine.batch import Passage, Prompt
from lmi_multi.errors import BackendError, LmiError, OptionError
from lmi_multi.model import Model
from tests.neuron_models import (
    BF16_ERROR,
    DEGREES,
    LARGEST_ERROR,
    LIMITS,
    WIDE,
    artifact,
    batches,
    emulated,
    ids,
    on_cpu,
)

pytest.importorskip("torch_xla", reason="the emulator needs torch-xla: see `make test-neuron`")
pytest.importorskip("jaxlib", reason="the emulator needs jaxlib: see `make test-neuron`")

STEPS = 32


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("family", WIDE)
def test_logits_are_those_of_the_cpu(family: str, degree: int, checkpoints: Path) -> None:
    opened = artifact(family, checkpoints)
    cpu, ours = on_cpu(opened), emulated(opened, degree)
    if family == "bert":
        prompts = [Prompt(ids(n, n), [i % 2 for i in range(n)]) for n in (11, 40)]
        (mine, pooled), (theirs, expected) = ours.encode(prompts), cpu.encode(prompts)
        assert pooled is not None
        assert expected is not None
        worst = max((mine - theirs).abs().max().item(), (pooled - expected).abs().max().item())
    else:
        worst = 0.0
        for batch in batches(opened.spec.kind):
            worst = max(worst, (ours.logits(batch) - cpu.logits(batch)).abs().max().item())
    print(f"{family} TP {degree}: {worst:.1e}")
    assert worst <= LARGEST_ERROR
    ours.close()


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("family", [name for name in WIDE if name != "bert"])
def test_greedy_tokens_are_those_of_the_cpu(
    family: str, degree: int, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More ragged prompts than rows; contexts of 32 tokens are left on the way."""
    monkeypatch.setenv("LMI_MULTI_NEURON_BUCKETS", "rows=4")
    source = artifact(family, checkpoints)
    prompts = [ids(n, n) for n in (11, 3, 20, 7, 1)]
    with (
        Model(source, "cpu", on_cpu(source)) as cpu,
        Model(source, "neuron", emulated(source, degree)) as ours,
    ):
        mine, theirs = (
            [c.token_ids for c in model.generate(prompts, max_new_tokens=STEPS, ignore_eos=True)]
            for model in (ours, cpu)
        )
    assert mine == theirs
    assert {len(tokens) for tokens in mine} == {STEPS}


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_scores_and_embeddings_are_those_of_the_cpu(family: str, checkpoints: Path) -> None:
    opened = artifact(family, checkpoints)
    cpu, ours = on_cpu(opened), emulated(opened, 2)
    encoder = ids(9, 1) if family == "t5" else None
    passages = [Passage(ids(n, n), encoder) for n in (50, 3)]
    torch.testing.assert_close(ours.score(passages), cpu.score(passages), atol=2e-4, rtol=0)
    prompts = [Prompt(ids(n, n)) for n in (40, 2)]
    torch.testing.assert_close(ours.encode(prompts)[0], cpu.encode(prompts)[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "degree"),
    [("gpt2", n) for n in DEGREES] + [("t5", 2), ("t5", 4), ("bloom", 2), ("llama", 4)],
)
def test_int8_weights(family: str, degree: int, checkpoints: Path) -> None:
    opened = artifact(family, checkpoints, quantize="int8")
    batch = batches(opened.spec.kind)[0]
    mine, theirs = emulated(opened, degree).logits(batch), on_cpu(opened).logits(batch)
    worst = (mine - theirs).abs().max().item()
    print(f"{family} int8 TP {degree}: {worst:.1e}")
    assert worst <= LARGEST_ERROR


@pytest.mark.parametrize(
    ("family", "degree"), [(family, 2) for family in WIDE] + [("llama", 4), ("t5", 8)]
)
def test_bf16(family: str, degree: int, checkpoints: Path) -> None:
    """Beside the CPU's float32, over a prefill and a cached step, or an encoder's output."""
    exact, ours = (
        on_cpu(artifact(family, checkpoints)),
        emulated(artifact(family, checkpoints, dtype="bf16"), degree),
    )
    if family == "bert":
        prompts = [Prompt(ids(n, n), [i % 2 for i in range(n)]) for n in (11, 40)]
        pairs = [tuple(executor.encode(prompts)[0] for executor in (ours, exact))]
    else:
        kind = artifact(family, checkpoints).spec.kind
        pairs = [(ours.logits(batch), exact.logits(batch)) for batch in batches(kind)[:2]]
    worst = max(((mine - theirs).norm() / theirs.norm()).item() for mine, theirs in pairs)
    print(f"{family} bf16 TP {degree}: {worst:.1e}")
    assert worst <= BF16_ERROR


@pytest.mark.parametrize("family", ["bloom", "llama", "t5"])
def test_every_rank_traces_the_same_graph(family: str, checkpoints: Path) -> None:
    from lmi_multi.backends.neuron import lint
    from lmi_multi.backends.neuron.buckets import Buckets, Kind
    from lmi_multi.backends.neuron.lower import Lowering, TraceCollectives
    from lmi_multi.backends.neuron.module import StaticModel

    from lmi_multi.models.weights import rank_data

    opened = artifact(family, checkpoints)
    spec = opened.spec
    lowerings = []
    for rank in range(4):
        tensors = opened.load_rank(rank, 4) | rank_data(spec, rank, 4)
        module = StaticModel(spec, tensors, TraceCollectives(4), 40, 8)
        lowerings.append(Lowering(module, module.state_names, 4))
    buckets = Buckets.of(spec, LIMITS, 40)
    encoded = buckets.encoded[0] if buckets.encoded else 0
    for trace in [buckets.decode(2, 1, 32, encoded, kind) for kind in Kind]:
        graphs = [lowering.lower(trace) for lowering in lowerings]
        lint.check(graphs[0], 4, trace.bounds)
        for other in graphs[1:]:
            lint.check_same(graphs[0], other)


class Pinned(torch.nn.Module):
    """A gather as torch-xla makes it by default: the rank that traces it is in its padding."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k0", torch.zeros(2))

    def forward(self, token_ids: torch.Tensor) -> list[torch.Tensor]:
        import torch_xla.core.xla_model as xm

        self.k0 = self.k0 + 1
        return [xm.all_gather(token_ids, 0, groups=[[0, 1]])]


def test_a_graph_that_knows_its_rank_is_refused_when_it_is_lowered() -> None:
    from lmi_multi.backends.neuron.emulator import EmulatorRuntime
    from lmi_multi.backends.neuron.program import Trace

    builder = EmulatorRuntime().builder(Pinned(), ["k0"], 2)
    with pytest.raises(BackendError, match=r"graph decode cannot run: ranks trace pad .* and pad"):
        builder.lower(Trace("decode", {"token_ids": (2,)}))


def test_stale_cache_changes_nothing(checkpoints: Path) -> None:
    """Blocks are not cleared: whatever a former owner left there, even a NaN, is masked."""
    opened = artifact("gpt2", checkpoints)
    ours = emulated(opened, 1)
    batch = batches("decoder")[1]
    ours.logits(batches("decoder")[0])
    before = ours.logits(batch)
    held = ours._program._held
    spoiled = torch.from_numpy(np.array(held["v0"])).clone()
    spoiled[31] = spoiled[-1] = float("nan")  # behind the longest row's tokens, and in the spare
    held["v0"] = ours._program._place([spoiled])
    assert ours.logits(batch).isfinite().all()
    assert torch.equal(ours.logits(batch), before)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "min_p": 0.05, "typical_p": 0.9, "seed": 5, "num_return_sequences": 3},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "logprobs": 2},
    {"num_beams": 4, "num_return_sequences": 2},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7},
    {"no_repeat_ngram_size": 2, "ignore_eos": True},
]


@pytest.fixture(params=["gpt2", "t5"])
def models(
    request: pytest.FixtureRequest, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Model, Model]]:
    monkeypatch.setenv("LMI_MULTI_NEURON_RUNTIME", "emulator")
    folder = artifact(request.param, checkpoints).folder
    with (
        load(folder, backend="cpu", max_batch=4, max_tokens=64) as cpu,
        load(folder, backend="neuron", tensor_parallel=2, max_batch=4, max_tokens=64) as ours,
    ):
        yield cpu, ours


def test_answers_are_those_of_the_cpu(models: tuple[Model, Model]) -> None:
    """More prompts than rows, two that begin alike, and every kind of option."""
    cpu, ours = models
    common = ids(24, 9)
    prompts = [ids(11, 1), [*common, 5], [*common, 6, 7], ids(3, 2), ids(20, 3), ids(1, 4)]
    for options in OPTIONS:
        results = [model.generate(prompts, max_new_tokens=16, **options) for model in (cpu, ours)]
        theirs, mine = ([c.token_ids for c in result] for result in results)
        assert mine == theirs, options
        assert [c.finish_reason for c in results[1]] == [c.finish_reason for c in results[0]]


def test_graphs_draw_what_the_cpu_draws(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that sample, each in its own way, beside greedy ones and ones that the host draws."""
    from lmi_multi.backends.neuron.emulator import EmulatorProgram

    monkeypatch.setenv("LMI_MULTI_NEURON_RUNTIME", "emulator")
    # Fewer graphs: those that draw take the emulator seconds to compile.
    monkeypatch.setenv("LMI_MULTI_NEURON_BUCKETS", "rows=4 queries=16,64 context=64")
    run_tags: list[str] = []
    real = EmulatorProgram.run

    def noted(self: EmulatorProgram, tag: str, **inputs: torch.Tensor) -> list[torch.Tensor]:
        run_tags.append(tag)
        return real(self, tag, **inputs)

    monkeypatch.setattr(EmulatorProgram, "run", noted)
    folder = artifact("gpt2", checkpoints).folder
    prompts = [ids(n, n) for n in (11, 3, 16, 7, 5)]
    options: list[dict[str, Any]] = [
        {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3},
        {"do_sample": True, "temperature": 1.7, "top_k": 0, "top_p": 0.6, "seed": 4},
        {"do_sample": True, "top_k": 3, "seed": 5},
        {},
        {"do_sample": True, "min_p": 0.05, "seed": 6},
    ]
    answers = []
    for backend, degree in (("cpu", 1), ("neuron", 2)):
        sizes = {"tensor_parallel": degree, "max_batch": 4, "max_tokens": 64}
        with load(folder, backend=backend, **sizes) as model:
            found = model.generate(prompts, options, max_new_tokens=16, ignore_eos=True)
            answers.append([completion.token_ids for completion in found])
    assert answers[1] == answers[0]
    assert "decode_4x1_of_64_sampled" in run_tags
    assert "decode_1x16_of_64" in run_tags  # prompts' first tokens are drawn by the host


def test_what_static_graphs_cannot_carry_is_refused_by_name(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmi_multi.backends.neuron import BACKEND

    from lmi_multi.models.spec import Rope, RopeScaling

    monkeypatch.setenv("LMI_MULTI_NEURON_RUNTIME", "emulator")
    opened = artifact("llama", checkpoints)
    scaling = RopeScaling(type="dynamic", factor=2.0, original_max=32)
    spec = replace(opened.spec, position=Rope(dim=8, scaling=scaling))
    sizes: dict[str, Any] = {"max_batch": 2, "max_tokens": 32}
    with pytest.raises(BackendError, match="rope scaling 'dynamic'"):
        BACKEND.load(replace(opened, spec=spec), tensor_parallel=1, **sizes)
    monkeypatch.setenv("LMI_MULTI_NEURON_INSTANCE", "trn1.32xlarge")
    with pytest.raises(OptionError, match=r"trn1.32xlarge .* runs this model over 1, 2, 8"):
        BACKEND.load(opened, tensor_parallel=4, **sizes)
    with pytest.raises(LmiError, match="16 cores are wanted, the emulator has"):
        emulated_cores(16)


def emulated_cores(count: int) -> None:
    from lmi_multi.backends.neuron.emulator import EmulatorRuntime

    EmulatorRuntime().builder(torch.nn.Module(), [], count)
