"""Neuron devices: what is found, what stands in the way, and which degrees are valid.

The listings are written from the documented fields of `neuron-ls -j`; none was recorded on a host.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from lmi_multi.backends.neuron import BACKEND, devices, instances, sizing
from lmi_multi.backends.neuron.devices import Core, Host

from lmi_multi.errors import BackendError, CapacityError, OptionError
from lmi_multi.fit import Network
from lmi_multi.models.registry import FAMILIES
from lmi_multi.models.spec import Alibi, ModelSpec

GIB = 2**30


def listing(count: int, cores: int = 2, **more: object) -> str:
    """As on an inf2 or trn1 host with `count` devices."""
    return json.dumps(
        [
            {
                "neuron_device": i,
                "bdf": f"00:{i:02x}.0",
                "connected_to": [n for n in (i - 1, i + 1) if 0 <= n < count],
                "nc_count": cores,
                "memory_size": 16 * cores * GIB,
                "neuron_processes": [],
                **more,
            }
            for i in range(count)
        ]
    )


def test_cores_of_inf2_24xlarge() -> None:
    cores = devices.parse(listing(6))
    assert [core.index for core in cores] == list(range(12))
    assert [core.device for core in cores] == [i // 2 for i in range(12)]
    assert {core.memory for core in cores} == {16 * GIB}
    assert {core.owner for core in cores} == {None}


def test_ids_of_cores_are_taken_where_the_tool_tells_them() -> None:
    one = listing(1, 4, neuroncore_ids=[4, 5, 6, 7], logical_neuroncore_config=2)
    assert [core.index for core in devices.parse(one)] == [4, 5, 6, 7]


def test_a_process_holds_its_device() -> None:
    held = json.loads(listing(2))
    held[1]["neuron_processes"] = [{"pid": 4711, "command": "python", "neuron_runtime_version": ""}]
    cores = devices.parse(json.dumps(held))
    assert [core.owner for core in cores] == [None, None, 4711, 4711]
    found = devices.fault(Host(("/dev/neuron0", "/dev/neuron1"), None, cores), 4)
    assert found is not None
    assert found[0] == (
        "4 NeuronCores are wanted, 2 of 4 are free; the others are held by process 4711"
    )
    assert found[1] == "end that process, or lower tensor_parallel"


def test_what_this_process_holds_is_free_to_it() -> None:
    own = Host(("/dev/neuron0",), None, [Core(i, 0, 1, os.getpid()) for i in range(2)])
    assert [core.index for core in own.free] == [0, 1]
    assert devices.fault(own, 2) is None


@pytest.mark.parametrize(
    ("owners", "needed", "reason", "remedy"),
    [
        ((7, 7), 1, "1 NeuronCore is wanted, 0 of 2 are free; all are held by process 7", "end t"),
        ((7, 8, None), 2, "1 of 3 are free; the others are held by processes 7, 8", "end those p"),
        ((None, None), 4, "4 NeuronCores are wanted, but this host has 2", "lower tensor_parallel"),
        ((), 1, "1 Neuron device, but neuron-ls lists no core", "modprobe neuron"),
    ],
)
def test_too_few_cores(
    owners: tuple[int | None, ...], needed: int, reason: str, remedy: str
) -> None:
    cores = [Core(i, i, 1, owner) for i, owner in enumerate(owners)]
    found = devices.fault(Host(("/dev/neuron0",), None, cores), needed)
    assert found is not None
    assert reason in found[0]
    assert remedy in found[1]


@pytest.mark.parametrize(
    ("output", "fault"),
    [
        ("neuron-ls: no devices", "printed no JSON: 'neuron-ls: no devices'"),
        ("{}", "printed no list"),
        ('[{"nc_count": 2}]', "a device without 'memory_size'"),
        ('[{"nc_count": "two"}]', "a device without invalid literal"),
    ],
)
def test_listings_that_cannot_be_read(output: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        devices.parse(output)


def host(tmp_path: Path, product: str, count: int = 0) -> Host:
    (tmp_path / "product").write_text(product + "\n")
    for i in range(count):
        (tmp_path / f"neuron{i}").touch()
    return devices.look(tmp_path, tmp_path / "product")


def test_no_driver_on_an_instance_that_has_cores(tmp_path: Path) -> None:
    found = devices.fault(host(tmp_path, "trn1n.32xlarge"))
    assert found is not None
    assert "trn1n.32xlarge has NeuronCores, but there is no /dev/neuron0" in found[0]
    assert "modprobe neuron" in found[1]


def test_a_machine_without_cores(tmp_path: Path) -> None:
    looked = host(tmp_path, "Standard PC (i440FX + PIIX, 1996)")
    assert looked == Host((), None)
    found = devices.fault(looked)
    assert found is not None
    assert found[0] == "no Neuron device (/dev/neuron0) here"


def test_devices_without_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(devices, "TOOL", str(tmp_path / "absent"))
    looked = host(tmp_path, "inf2.48xlarge", 12)
    assert [Path(name).name for name in looked.devices] == [f"neuron{i}" for i in range(12)]
    found = devices.fault(looked)
    assert found is not None
    assert "12 Neuron devices, but no list of cores: " in found[0]
    assert "aws-neuronx-tools" in found[1]


def test_the_tool_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "neuron-ls"
    tool.write_text(f"#!/bin/sh\n[ $1 = -j ] && echo '{listing(1)}'\n")
    tool.chmod(0o755)
    monkeypatch.setattr(devices, "TOOL", str(tool))
    looked = host(tmp_path, "inf2.xlarge", 1)
    assert len(looked.cores) == 2
    assert looked.instance == "inf2.xlarge"
    tool.write_text("#!/bin/sh\necho no driver >&2\nexit 3\n")
    assert host(tmp_path, "inf2.xlarge", 1).error == "neuron-ls failed: no driver"


def some_cores(free: list[int], of: int) -> Host:
    return Host(
        ("/dev/neuron0",), None, [Core(i, i // 2, 1, None if i in free else 7) for i in range(of)]
    )


def test_cores_are_neighbours_at_a_multiple_of_the_degree() -> None:
    assert devices.choose(some_cores([1, 2, 3, 4, 5], 6), 2) == [2, 3]
    assert devices.choose(some_cores([1, 2], 6), 2) == [1, 2]
    with pytest.raises(BackendError, match="2 neighbouring NeuronCores are wanted, free are 0, 2"):
        devices.choose(some_cores([0, 2], 4), 2)


def spec(heads: int = 32) -> ModelSpec:
    return ModelSpec(
        family="bloom",
        vocab=8,
        hidden=heads * 8,
        heads=heads,
        ffn=96,
        position=Alibi(),
        decoder_layers=1,
    )


def test_degrees_of_instances() -> None:
    assert instances.find("inf2.xlarge").degrees == (1, 2)
    assert instances.find("inf2.24xlarge").degrees == (1, 2, 4, 8)
    assert instances.find("inf2.48xlarge").degrees == (1, 2, 4, 8, 24)
    assert instances.find("trn1n.32xlarge").degrees == (1, 2, 8, 16, 32)
    assert instances.find("trn2.48xlarge").device_bytes == 24 * GIB


def test_wrong_degrees_list_the_valid_ones() -> None:
    trn1 = instances.find("trn1.32xlarge")
    instances.check(spec(), trn1, 8)
    with pytest.raises(
        OptionError, match=r"tensor_parallel is 4, but trn1.32xlarge .* 1, 2, 8, 16, 32$"
    ):
        instances.check(spec(), trn1, 4)
    with pytest.raises(OptionError, match=r"trn1.32xlarge .* runs this model over 1, 2$"):
        instances.check(spec(12), trn1, 4)
    with pytest.raises(OptionError, match=r"has 32 NeuronCores and runs 1, 2, 8, 16, 32$"):
        instances.check(None, trn1, 4)
    with pytest.raises(OptionError, match=r"heads 12, .* split on trn1.32xlarge over 1, 2$"):
        instances.check(spec(12), trn1, 8)
    with pytest.raises(OptionError, match=r"instance is 'inf2.9xlarge'; did you mean 'inf2.xla"):
        instances.find("inf2.9xlarge")
    with pytest.raises(OptionError, match=r"instance is 'p5.48xlarge', must be one with NeuronCo"):
        instances.find("p5.48xlarge")


def network(layers: int, hidden: int = 4096) -> Network:
    """As BLOOM; a layer of 4096 has 0.375 GiB."""
    big = ModelSpec(
        family="bloom",
        vocab=256,
        hidden=hidden,
        heads=64,
        ffn=4 * hidden,
        position=Alibi(),
        decoder_layers=layers,
    )
    family = next(family for family in FAMILIES if family.name == "bloom")
    modules = (name for name, weight in family.weights(big).items() if not weight.optional)
    return Network("big", big, tuple(f"{name}.weight" for name in modules), "bf16", None, True)


def test_fp8_weights_are_refused_by_name() -> None:
    sizes = {"instance": "inf2.8xlarge", "tensor_parallel": 1, "max_batch": 1, "max_tokens": 64}
    with pytest.raises(BackendError, match="quantize is 'fp8', must be None or int8: NeuronCores"):
        BACKEND.plan(replace(network(1), quantize="fp8"), **sizes)


@pytest.mark.parametrize(
    ("layers", "instance", "degree", "tokens", "refusal"),
    [
        (
            45,
            "inf2.8xlarge",
            1,
            512,
            "big does not fit 1 cores of inf2.8xlarge: 1.9 GiB of device memory are missing for "
            "the weights; what would fit: tensor_parallel 2, or int8 weights",
        ),
        (
            100,
            "inf2.8xlarge",
            1,
            512,
            "big does not fit 1 cores of inf2.8xlarge: 22.5 GiB of device memory are missing for "
            "the weights; what would fit: trn2.3xlarge at tensor_parallel 2",
        ),
        (
            45,
            "inf2.xlarge",
            2,
            512,
            "big does not fit 2 cores of inf2.xlarge: 2.9 GiB of host memory are missing to load "
            "it; what would fit: int8 weights",
        ),
        (
            30,
            "inf2.8xlarge",
            1,
            6000,
            "big does not fit 1 cores of inf2.8xlarge: a row of 6000 tokens, and as much to score "
            "one, need 2.50 GiB more of cache; what would fit: tensor_parallel 2, or int8 weights",
        ),
        (
            500,
            "inf2.48xlarge",
            8,
            512,
            "big does not fit 8 cores of inf2.48xlarge: 360.0 GiB of device memory are missing for "
            "the weights; no instance with NeuronCores would take it at this max_tokens",
        ),
    ],
)
def test_what_does_not_fit_says_by_how_much_and_what_would(
    layers: int, instance: str, degree: int, tokens: int, refusal: str
) -> None:
    hidden = 16384 if layers == 500 else 4096
    with pytest.raises(CapacityError) as caught:
        sizing.limits_on(network(layers, hidden), instances.find(instance), degree, 1, tokens)
    assert str(caught.value) == refusal


def test_limits_follow_from_the_instance_alone() -> None:
    inf2 = instances.find("inf2.8xlarge")
    small = sizing.limits_on(network(30), inf2, 2, 4, 512)
    assert (small.max_batch, small.max_tokens, small.blocks) == (4, 512, 4 * 32)
    full = sizing.limits_on(network(30), inf2, 1, 64, 512)
    needed = sizing.core_bytes(network(30), 1, full)
    block = 2 * 30 * 16 * 64 * 64 * 2
    assert needed["cache"] == block * (full.blocks + 32 + 1)
    room = inf2.device_bytes - needed["reserved"] - needed["weights"]
    assert needed["cache"] <= 0.8 * room < needed["cache"] + block
