"""Which graphs a model has, and what `plan`, `compile` and `load` refuse at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lmi_multi.backends.neuron import runtimes, sizing
from lmi_multi.backends.neuron.buckets import Buckets

from lmi_multi import load
from lmi_multi.backends.base import Limits
from lmi_multi.cli.main import run
from lmi_multi.errors import LmiError, OptionError
from tests.test_neuron_devices import GIB, spec


def planned(capsys: pytest.CaptureFixture[str], max_batch: int) -> dict[str, Any]:
    """What `lmi-multi plan` prints as JSON for the demo model."""
    sizes = f"--tensor-parallel 2 --max-tokens 64 --max-batch {max_batch}".split()
    assert run(["plan", "demo", "--json", "--instance", "inf2.xlarge", *sizes]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_a_plan_lists_graphs_and_the_bytes_of_a_core(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = planned(capsys, 2)
    assert plan["buckets"] == {
        "rows": [1, 2],
        "queries": [16, 64],
        "context": [32, 64],
        "encoded": [32, 64],
    }
    names = [graph["name"] for graph in plan["graphs"]]
    # 2 encoders; for each of 2 contexts 2 rows, greedy and sampled, and 2 beams; 16 queries in both
    # and 64 in one, greedy and with all logits.
    assert len(names) == len(set(names)) == 2 + 2 * (2 * 2 + 1) + 2 * 3
    assert plan["core_bytes"]["reserved"] == GIB
    counts = [graph["instructions"] for graph in plan["graphs"]]
    if plan["uncounted"]:
        assert plan["uncounted"].startswith("tracing needs torch_xla")
        assert set(counts) == {None}
    else:
        assert min(counts) > 10


@pytest.mark.parametrize(
    ("encoder_layers", "max_batch", "max_tokens", "graphs"),
    [(0, 4, 512, 52), (0, 16, 2048, 86), (0, 32, 8192, 105), (2, 4, 512, 51), (2, 16, 2048, 85)],
)
def test_defaults_make_about_a_hundred_graphs(
    encoder_layers: int, max_batch: int, max_tokens: int, graphs: int
) -> None:
    limits = Limits(max_batch, max_tokens, sizing.MAX_STEP_TOKENS, blocks=1, block_size=16)
    made = Buckets.of(replace(spec(), encoder_layers=encoder_layers), limits, 1)
    assert len({trace.tag for trace in made.traces()}) == graphs
    powers = [2**n for n in range(20)]
    assert all(step in powers for steps in made.ladders.values() for step in steps)
    assert made.context[-1] == max_tokens
    # Whatever a step needs, some graph holds it.
    for queries in (1, *made.queries):
        for context in (1, 33, 300, max_tokens):
            for encoded in (0,) if not encoder_layers else (1, 300, max_tokens):
                assert made.size(queries, context, encoded) >= (context, encoded)


def test_steps_below_the_default_can_be_named() -> None:
    limits = Limits(4, 2048, sizing.MAX_STEP_TOKENS, blocks=1, block_size=16)
    made = Buckets.of(replace(spec(), encoder_layers=2), limits, 1)
    assert made.ladders["context"] == [128, 256, 512, 1024, 2048]
    finer = made.having("context=32,2048 encoded=512,2048")
    assert finer.sizes(1) == [(32, 512), (2048, 512), (2048, 2048)]
    assert finer.size(1, 20, 600) == (2048, 2048)
    assert finer.size(16, 20, 0) == (32, 512)


def test_buckets_can_be_pruned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = "rows=1,4 queries=64 context=64 encoded=64"
    monkeypatch.setenv("LMI_MULTI_NEURON_BUCKETS", kept)
    plan = planned(capsys, 4)
    assert plan["buckets"] == {"rows": [1, 4], "queries": [64], "context": [64], "encoded": [64]}
    assert [graph["name"] for graph in plan["graphs"]] == [
        "encode_64",
        "decode_1x1_of_64_with_64",
        "decode_4x1_of_64_with_64",
        "decode_1x1_of_64_with_64_sampled",
        "decode_4x1_of_64_with_64_sampled",
        "decode_4x1_of_64_with_64_beams",
        "decode_1x64_of_64_with_64",
        "decode_1x64_of_64_with_64_all",
    ]


@pytest.mark.parametrize(
    ("pruned", "fault"),
    [
        ("layers=1", "names 'layers', must be of rows, queries, context$"),
        ("rows=1,2", "has 'rows=1,2', must be 4 and any of 1, 2, 4$"),
        ("rows=3,4", "has 'rows=3,4', must be 4 and any of 1, 2, 4$"),
        ("context", "has 'context', must be 64 and any of 32, 64$"),
    ],
)
def test_buckets_that_cannot_be_pruned_so(pruned: str, fault: str) -> None:
    limits = Limits(max_batch=4, max_tokens=64, max_step_tokens=64, blocks=8, block_size=16)
    with pytest.raises(OptionError, match=f"LMI_MULTI_NEURON_BUCKETS {fault}"):
        Buckets.of(spec(), limits, 8).having(pruned)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ("plan demo --tensor-parallel 2", "tensor_parallel needs an instance"),
        ("plan demo --max-batch 2", "max_batch needs tensor_parallel"),
        (
            "plan demo --tensor-parallel 2 --instance g5.xlarge",
            "must be one with NeuronCores: inf2",
        ),
        (
            "plan demo --tensor-parallel 4 --instance trn1.32xlarge",
            "but trn1.32xlarge has 32 NeuronCores and runs this model over 1, 2, 8",
        ),
        (
            "plan demo --tensor-parallel 24 --instance inf2.48xlarge",
            "can be split on inf2.48xlarge over 1, 2, 4, 8",
        ),
        ("compile demo --instance inf2.9xlarge", "did you mean 'inf2.xlarge'?"),
        ("compile demo --instance inf2.xlarge --jobs 0", "jobs is 0, must be at least 1"),
        ("compile demo --instance inf2.xlarge --max-batch 0", "max_batch is 0, must be an integer"),
        (
            "compile demo --instance inf2.xlarge --cache s3:///x",
            "'s3:///x' is no address on S3, expected s3://BUCKET/PREFIX",
        ),
        (
            "compile demo --instance inf2.xlarge --cache gs://bucket/x",
            "cache is 'gs://bucket/x', must be a folder or s3://BUCKET/PREFIX",
        ),
        ("compile demo --instance inf2.xlarge --tensor-parallel 3", "and runs 1, 2"),
        ("compile demo --instance inf2.xlarge --max-tokens 0", "max_tokens is 0, must be an integ"),
        (
            "compile demo --instance inf2.48xlarge --tensor-parallel 24",
            "can be split on inf2.48xlarge over 1, 2, 4, 8",
        ),
    ],
)
def test_commands_say_what_is_valid(
    arguments: str,
    fault: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("LMI_MULTI_NEURON_RUNTIME", "emulator")
    monkeypatch.setenv("LMI_MULTI_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtimes, "find_spec", lambda name: name)
    assert run(arguments.split()) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert fault in shown
    if arguments.startswith("compile"):
        assert not list(tmp_path.iterdir()), "converted before it was refused"


def test_compile_refuses_what_does_not_fit_before_it_converts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LMI_MULTI_NEURON_RUNTIME", "emulator")
    monkeypatch.setattr(runtimes, "find_spec", lambda name: name)
    monkeypatch.setenv("LMI_MULTI_CACHE", str(tmp_path))
    monkeypatch.setattr(sizing, "RESERVED", 16 * GIB)
    monkeypatch.setattr("lmi_multi.fit.RESERVED", 16 * GIB)
    assert run(["compile", "demo", "--instance", "inf2.xlarge"]) != 0
    assert "demo does not fit 1 cores of inf2.xlarge: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"tensor_parallel": 4}, "but trn1.32xlarge has 32 NeuronCores and runs 1, 2, 8, 16, 32"),
        ({"pipeline_parallel": 2}, "pipeline_parallel is 2; allowed on NeuronCores: 1"),
        ({"quantize": "fp8"}, "quantize is 'fp8', must be None or int8"),
    ],
)
def test_loading_refuses_what_cores_cannot_run_before_it_converts(
    given: dict[str, Any], fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LMI_MULTI_CACHE", str(tmp_path))
    monkeypatch.setenv("LMI_MULTI_NEURON_RUNTIME", "emulator")
    monkeypatch.setenv("LMI_MULTI_NEURON_INSTANCE", "trn1.32xlarge")
    monkeypatch.setattr(runtimes, "find_spec", lambda name: name)
    with pytest.raises(LmiError, match=fault):
        load("demo", backend="neuron", **given)
    assert not list(tmp_path.iterdir())


def test_compile_refuses_what_cores_cannot_run_before_it_converts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LMI_MULTI_CACHE", str(tmp_path))
    on = ["compile", "demo", "--instance", "inf2.xlarge"]
    assert run([*on, "--quantize", "fp8"]) != 0
    assert "quantize is 'fp8', must be None or int8" in capsys.readouterr().err
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    monkeypatch.setenv(runtimes.VARIABLE, "emulator")
    assert run(on) != 0
    assert "the emulator needs torch_xla" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
