"""Which instance a model fits: against sums done by hand, and rules that hold for every model."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmi_multi import fit
from lmi_multi.checkpoint.convert import convert
from lmi_multi.checkpoint.layout import QuantizeName
from lmi_multi.checkpoint.reader import SafetensorsFile
from lmi_multi.cli.main import run
from lmi_multi.errors import CheckpointError, OptionError
from lmi_multi.fit import Option, estimate, report
from lmi_multi.instances import GIB, INSTANCES, Instance, find
from lmi_multi.models.schema import valid_degrees
from lmi_multi.models.spec import ModelSpec, Rope
from lmi_multi.network import Network, read_network
from tests.checkpoint.tiny import LLAMA, llama_state, t5_config, t5_state, write


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("fit") / "llama", llama_state())


def machine(device: int, host: int = 2**40, devices: int = 4) -> Instance:
    return Instance("test.large", "cuda", "T", devices, device, host, tuple(range(1, devices + 1)))


# By hand


def test_weights_by_hand(llama: Path) -> None:
    network = read_network(llama)
    hidden, ffn, vocab, layers = 16, 24, 37, 2
    # Whole on every rank: three norms a stack's end and two a layer.
    norms = hidden + layers * 2 * hidden
    qkv, out, up, down = (16 + 8 + 8) * hidden, hidden * 16, 2 * ffn * hidden, hidden * ffn
    matrices = layers * (qkv + out + up + down)
    assert network.weight_bytes("fp32", None, 1) == 4 * (2 * vocab * hidden + norms + matrices)
    assert network.weight_bytes("bf16", None, 1) == 2 * (2 * vocab * hidden + norms + matrices)
    # Two ranks: the vocabulary is filled up to 38.
    assert network.weight_bytes("fp16", None, 2) == 2 * (38 * hidden + norms + matrices // 2)
    # A byte a weight, and four a channel; the head is quantized, the embedding is not.
    channels = layers * ((16 + 8 + 8) + hidden + 2 * ffn + hidden) + vocab
    for kind in get_args(QuantizeName):
        assert network.weight_bytes("bf16", kind, 1) == (
            2 * (vocab * hidden + norms) + matrices + vocab * hidden + 4 * channels
        )


def test_cache_by_hand(llama: Path) -> None:
    network = read_network(llama)
    # Keys and values of 2 layers, 2 kv heads of 4, two bytes each: 64 bytes a token.
    block = 16 * 2 * 2 * 2 * 4 * 2
    weights = network.weight_bytes("bf16", None, 1)
    wanted = 10 * (64 // 16) * block  # ten rows of 64 tokens
    beside = network.workspace_bytes("bf16", None, 1, None, 64)
    # A tenth stays free: less than what driver and runtime are assumed to take.
    one = machine(fit.RESERVED + weights + beside + wanted)
    assert one.device_bytes // 10 < fit.RESERVED
    option = estimate(network, one, "bf16", None, 1, max_tokens=64)
    assert (option.fits, option.batch, option.max_tokens) == (True, 10, 64)
    assert option.longest == 10 * 64 and option.cache_bytes == wanted
    less = estimate(network, machine(one.device_bytes - 1), "bf16", None, 1, max_tokens=64)
    assert less.batch == 9
    wide = network.weight_bytes("fp32", None, 1) + network.workspace_bytes(
        "fp32", None, 1, None, 64
    )
    same = machine(fit.RESERVED + wide + wanted)
    assert estimate(network, same, "fp32", None, 1, max_tokens=64).batch == 5
    # kv heads are split over two ranks, so a block takes half as much of each.
    more = machine(fit.RESERVED + weights + 2 * GIB + beside)  # ranks take memory of their own
    two, single = (
        estimate(network, more, "bf16", None, degree, max_tokens=64) for degree in (2, 1)
    )
    assert two.cache_bytes < single.cache_bytes and (two.batch or 0) == 2 * two.cache_bytes // (
        (64 // 16) * block
    )


def test_the_share_is_of_all_memory(llama: Path) -> None:
    network = read_network(llama)
    whole, half = (
        estimate(network, machine(8 * GIB), "bf16", None, 1, 64, share) for share in (0.8, 0.5)
    )
    assert whole.cache_bytes - half.cache_bytes == pytest.approx(0.3 * 8 * GIB, abs=2)
    # Not more than is free.
    most = estimate(network, machine(8 * GIB), "bf16", None, 1, 64, 1.0)
    assert most.cache_bytes - whole.cache_bytes == pytest.approx(
        0.2 * 8 * GIB - fit.RESERVED, abs=2
    )


def test_encoder_decoders_cache_the_prompt_too(tmp_path: Path) -> None:
    network = read_network(write(tmp_path / "t5", t5_state(), t5_config()))
    option = estimate(network, machine(2 * GIB), "bf16", None, 1, max_tokens=64)
    blocks = option.cache_bytes // (16 * 2 * 1 * 2 * 4 * 2)
    assert option.batch == blocks // 8 and option.longest == blocks // 2 * 16


def test_why_it_does_not_fit(llama: Path) -> None:
    network = read_network(llama)
    weights = network.weight_bytes("bf16", None, 1)

    def reason(device: int, host: int = 2**40) -> str:
        option = estimate(network, machine(device, host), "bf16", None, 1)
        assert not option.fits and option.batch is None
        return option.reason or ""

    beside = network.workspace_bytes("bf16", None, 1, None, None)
    assert "device memory are missing for the weights and what a step needs beside them" in reason(
        fit.RESERVED + weights + beside - 1
    )
    assert "of host memory are missing to load it" in reason(GIB * 9, fit.HOST_RESERVED + 1)
    assert "tokens needs" in reason(fit.RESERVED + weights + beside)


def test_stages_by_hand(llama: Path) -> None:
    """Two layers, one a stage: the last stage has the final norm and the head besides."""
    network = read_network(llama)
    whole = network.weight_bytes("bf16", None, 1)
    hidden, vocab = 16, 37
    ends = 2 * vocab * hidden
    layer = (whole - 2 * ends - 2 * hidden) // 2
    first, last = network.needs("bf16", None, 1, 2, None, 64)
    assert (first.weights, first.layers) == (layer + ends, 1)
    assert (last.weights, last.layers) == (layer + ends + 2 * hidden, 1)
    # The last one draws: 64 rows of logits, 32 bytes each, three times.
    assert last.workspace - first.workspace == 3 * 64 * vocab * 32
    # Each is a process of its own, for which 1 GiB is kept; its graphs have half of the layers, and
    # no kernel has several of them: x four times in float32, qkv twice, gate and up twice, for 62
    # rows.
    alone = network.workspace_bytes("bf16", None, 1, None, 64)
    programs = 62 * 2 * (4 * hidden * 4 + 2 * (16 + 8 + 8) * 2 + 2 * 2 * 24 * 2)
    assert last.workspace - alone == GIB - 80 * 16 * 16 * 1024 - programs
    one = machine(fit.RESERVED + last.weights + last.workspace + 2**20)
    staged = estimate(network, one, "bf16", None, 1, max_tokens=64, stages=2)
    assert staged.weight_bytes == last.weights and staged.pipeline_parallel == 2
    assert staged.cache_bytes == 2**20
    halved = 16 * 2 * 1 * 2 * 4 * 2  # a block of one layer
    assert staged.batch == staged.cache_bytes // halved // 4


def test_the_stage_with_least_room_for_each_layer_counts(llama: Path) -> None:
    two = read_network(llama)
    third = (n.replace(".1.", ".2.") for n in two.tensors if n.startswith("decoder.1."))
    spec = replace(two.spec, decoder_layers=3)
    network = replace(two, spec=spec, tensors=(*two.tensors, *third))
    needs = network.needs("bf16", None, 1, 2, None, None)
    assert sorted(need.layers for need in needs) == [1, 2]
    budget = max(need.weights + need.workspace for need in needs) + 2**30
    least = min(needs, key=lambda need: need.room(budget))
    assert least.layers == 2
    option = estimate(network, machine(fit.RESERVED + budget), "bf16", None, 1, stages=2)
    assert option.weight_bytes == least.weights
    assert option.cache_bytes == least.left(budget)


def test_stages_need_devices_of_their_own(llama: Path) -> None:
    network = read_network(llama)
    found = report(network, [find("g5.12xlarge"), find("inf2.24xlarge")], pipeline_parallel=2)
    degrees = {i.name: {o.tensor_parallel for o in i.options} for i in found.instances}
    assert degrees == {"g5.12xlarge": {1, 2}, "inf2.24xlarge": set()}
    assert {s.pipeline_parallel for s in found.smallest} == {2}
    with pytest.raises(OptionError, match="pipeline_parallel is 3, but the decoder has 2 layers"):
        report(network, pipeline_parallel=3)


# Rules


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Llamas of any shape, from a toy to far beyond every instance."""
    head_dim = draw(st.sampled_from([16, 64, 128]))
    kv_heads = draw(st.sampled_from([1, 2, 8]))
    heads = kv_heads * draw(st.sampled_from([1, 4, 8]))
    layers = draw(st.integers(1, 120))
    spec = ModelSpec(
        family="llama",
        vocab=draw(st.integers(100, 200_000)),
        hidden=heads * head_dim,
        heads=heads,
        kv_heads=kv_heads,
        ffn=64 * draw(st.integers(1, 512)),
        position=Rope(dim=head_dim),
        decoder_layers=layers,
        max_positions=draw(st.sampled_from([512, 4096, 131_072])),
        norm="rms",
        gated=True,
        activation="silu",
    )
    modules = ["embed", "norm", "head"] + [
        f"decoder.{layer}.{name}"
        for layer in range(layers)
        for name in ("norm1", "norm2", "qkv", "out", "up", "down")
    ]
    names = tuple(f"{module}.weight" for module in modules)
    return Network("drawn", spec, names, "bf16", None, False)


def rooms(option: Option) -> tuple[int, int]:
    return option.batch or 0, option.longest or 0


@settings(max_examples=25, deadline=None)
@given(networks(), st.integers(1, 1200), st.integers(1, 2500))
def test_rules(network: Network, device_gib: int, host_gib: int) -> None:
    one = machine(device_gib * GIB, host_gib * GIB, devices=8)
    degrees = [d for d in one.degrees if d in valid_degrees(network.spec, 8)]
    found = {
        (dtype, kind, degree): estimate(network, one, dtype, kind, degree)
        for dtype, kind in network.formats()
        for degree in degrees
    }
    for (dtype, kind, degree), option in found.items():
        assert option.fits == (option.reason is None) == (option.batch is not None)
        assert option.cache_bytes + option.weight_bytes <= one.device_bytes or not option.fits
        if kind:  # never more than the same without, but for the one weight that is widened
            plain = found[dtype, None, degree]
            widened = network.workspace_bytes(dtype, kind, degree, None, None)
            widened -= network.workspace_bytes(dtype, None, degree, None, None)
            assert option.weight_bytes <= plain.weight_bytes
            if plain.weight_bytes - option.weight_bytes >= widened:
                assert option.fits or not plain.fits
                assert rooms(option) >= rooms(plain)
        if dtype != "fp32":
            wide = found["fp32", kind, degree]
            assert option.weight_bytes <= wide.weight_bytes and (option.fits or not wide.fits)
    for lower, higher in pairwise(degrees):
        for dtype, kind in network.formats():
            assert found[dtype, kind, higher].weight_bytes <= found[dtype, kind, lower].weight_bytes
    more = machine(2 * one.device_bytes, 2 * one.host_bytes, devices=8)
    for (dtype, kind, degree), option in found.items():
        richer = estimate(network, more, dtype, kind, degree)
        assert richer.fits or not option.fits
        assert rooms(richer) >= rooms(option)


def test_smallest_comes_first(llama: Path) -> None:
    found = report(read_network(llama))
    assert len(found.smallest) == 9 and {s.instance for s in found.smallest} == {"g5.xlarge"}
    sizes = [i.devices * i.device_bytes for i in found.instances]
    assert sizes == sorted(sizes) and len(found.instances) == len(INSTANCES)
    none = report(read_network(llama), [machine(GIB)])
    assert none.smallest == []


# What is read


def test_no_tensor_is_read(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(SafetensorsFile, "read", never)
    assert len(read_network(llama).tensors) == 15
    # Without looking, a head is a copy of the embedding where the config says so.
    config = json.loads((llama / "config.json").read_text())
    tied = llama.parent / "tied"
    write(tied, llama_state(), config | {"tie_word_embeddings": True})
    assert "head.weight" not in read_network(tied).tensors


@pytest.mark.parametrize("kind", get_args(QuantizeName))
def test_artifacts_are_taken_as_they_are(llama: Path, tmp_path: Path, kind: QuantizeName) -> None:
    artifact = convert(llama, tmp_path / "out", dtype="fp16", quantize=kind, tensor_parallel=2)
    network = read_network(tmp_path / "out")
    assert network.formats() == [("fp16", kind)]
    for degree in (1, 2, 4):
        assert network.weight_bytes("fp16", kind, degree) == artifact.tensor_bytes(0, degree)
    found = report(network, [find("g5.12xlarge")])
    assert {(o.dtype, o.quantize) for o in found.instances[0].options} == {("fp16", kind)}


# The command


def test_overview(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(llama)]) == 0
    shown = capsys.readouterr()
    assert all(instance.name in shown.out for instance in INSTANCES)
    assert "own dtype fp32" in shown.out and "bf16 int8" in shown.out
    assert "fp8 takes on GPUs what int8 takes" in shown.err
    assert "smallest for bf16: g5.xlarge at tp 1" in shown.err
    assert "estimates from shapes" in shown.err


def test_one_instance(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", str(llama), "--instance", "ml.inf2.24xlarge", "--max-tokens", "100"]
    assert run(args) == 0
    shown = capsys.readouterr().out
    assert "12 x Inferentia2 core" in shown and "of 100 tokens" in shown
    assert shown.count("bf16") == 9  # degrees 1, 2, 4; plain, int8 and fp8
    assert shown.count("NeuronCores run no fp8 weights") == 9


def test_stages_are_shown(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(llama), "--instance", "g5.12xlarge", "--pipeline-parallel", "2"]) == 0
    shown = capsys.readouterr()
    assert "2 stages" in shown.out
    assert "smallest for bf16: g5.12xlarge at tp 1 pp 2" in shown.err


def test_json(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(llama), "--instance", "p5.48xlarge", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(shown) == {
        *("source", "family", "kind", "parameters", "dtype", "quantize", "degrees", "smallest"),
        *("instances", "assumptions"),
    }
    (instance,) = shown["instances"]
    assert (instance["name"], instance["devices"]) == ("p5.48xlarge", 8)
    assert {o["tensor_parallel"] for o in instance["options"]} == {1, 2, 4}
    assert set(instance["options"][0]) == {
        *("dtype", "quantize", "tensor_parallel", "weight_bytes", "cache_bytes", "fits"),
        *("pipeline_parallel", "reason", "batch", "max_tokens", "longest"),
    }
    assert shown["assumptions"]["memory_share_of_a_gpu"] == 0.9


def test_a_share_of_the_memory(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def batches(*args: str) -> tuple[list[int], float]:
        assert run(["plan", str(llama), "--instance", "g5.12xlarge", "--json", *args]) == 0
        shown = json.loads(capsys.readouterr().out)
        share = shown["assumptions"]["memory_share_of_a_gpu"]
        return [o["batch"] for o in shown["instances"][0]["options"]], share

    whole, half = batches(), batches("--memory-share", "0.45")
    assert (whole[1], half[1]) == (0.9, 0.45)
    # A little more than half goes, as the workspace stays.
    assert all(a / 3 < b < a / 2 for a, b in zip(whole[0], half[0], strict=True))


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--instance", "g7.big"], 2, "instance is 'g7.big'; did you mean"),
        (["--max-tokens", "0"], 2, "max_tokens is 0, must be an integer, at least 1"),
        (["--max-tokens", "9999"], 2, "but the model's positions end at 2048"),
        (["--memory-share", "1.5"], 2, "memory_share is 1.5, must be None or a number above 0"),
        (["--memory-share", "0"], 2, "memory_share is 0.0, must be None or a number above 0"),
        (
            ["--memory-share", "0.5", "--instance", "inf2.xlarge"],
            2,
            "memory_share is 0.5; allowed on NeuronCores: nothing",
        ),
        (
            ["--memory-share", "0.5", "--instance", "inf2.xlarge", "--tensor-parallel", "1"],
            2,
            "memory_share is 0.5; allowed for the list of graphs: nothing",
        ),
        (["--pipeline-parallel", "3"], 2, "pipeline_parallel is 3, but the decoder has 2 layers"),
        (["--revision", "x"], 2, "is a local folder without any"),
    ],
)
def test_wrong_options(
    llama: Path, capsys: pytest.CaptureFixture[str], args: list[str], code: int, message: str
) -> None:
    assert run(["plan", str(llama), *args]) == code
    shown = capsys.readouterr()
    assert message in shown.err and len(shown.err.splitlines()) == 1 and not shown.out


def test_wrong_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, message in (("./none", "does not exist"), ("", "source is empty")):
        assert run(["plan", source]) in (1, 2)
        assert message in capsys.readouterr().err
    folder = write(tmp_path / "bad", llama_state(), LLAMA | {"hidden_size": 17})
    with pytest.raises(CheckpointError):
        read_network(folder)
