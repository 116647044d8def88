"""The table of instances: what AWS tells of each, and how one is found by its name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import moto.ec2
import pytest

from lmi_multi.errors import OptionError
from lmi_multi.instances import GIB, INSTANCES, find

FAMILIES = set("g5 g6 g6e p4d p4de p5 p5e p5en inf2 trn1 trn1n trn2".split(" "))  # noqa: SIM905


def test_the_table_is_what_aws_tells() -> None:
    file = Path(moto.ec2.__file__).parent / "resources" / "instance_types.json.gz"
    told: dict[str, Any] = json.loads(gzip.decompress(file.read_bytes()))
    for instance in INSTANCES:
        entry = told[instance.name]
        assert entry["MemoryInfo"]["SizeInMiB"] * 2**20 == instance.host_bytes
        assert entry["InstanceStorageSupported"] == instance.has_disk
        if instance.backend == "cuda":
            (gpu,) = entry["GpuInfo"]["Gpus"]
            assert (gpu["Name"], gpu["Count"]) == (instance.device, instance.devices)
            assert gpu["MemoryInfo"]["SizeInMiB"] * 2**20 == instance.device_bytes
        elif not instance.name.startswith("trn2"):  # there the API's figure is not the chip's
            (chip,) = entry["NeuronInfo"]["NeuronDevices"]
            cores = chip["CoreInfo"]["Count"]
            assert chip["Count"] * cores == instance.devices
            assert chip["MemoryInfo"]["SizeInMiB"] * 2**20 == instance.device_bytes * cores
    families = {name.partition(".")[0] for name in told if name.split(".")[0] in FAMILIES}
    assert families == {i.name.partition(".")[0] for i in INSTANCES}
    for family in FAMILIES - {"trn2"}:
        sizes = {name for name in told if name.startswith(f"{family}.")}
        assert sizes == {i.name for i in INSTANCES if i.name.startswith(f"{family}.")}


def test_neuron_figures() -> None:
    assert find("trn2.48xlarge").devices * find("trn2.48xlarge").device_bytes == 1536 * GIB
    assert find("inf2.24xlarge").degrees == (1, 2, 4, 8)
    assert find("trn1.32xlarge").degrees == (1, 2, 8, 16, 32)
    assert find("inf2.48xlarge").degrees[-1] == 24


def test_finding_an_instance() -> None:
    assert find("ml.g5.12xlarge") == find(" G5.12xlarge") == find("g5.12xlarge")
    with pytest.raises(OptionError, match=r"instance is 'g5.128xlarge'; did you mean 'g5.12xlarge"):
        find("g5.128xlarge")
    with pytest.raises(OptionError, match="did you mean"):
        find("???")
