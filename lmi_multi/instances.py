"""The accelerated EC2 instance types that this package is for: what each has.

GPUs, host memory, disks and Inferentia2 and Trainium devices are those that EC2's
DescribeInstanceTypes tells (GpuInfo, MemoryInfo, InstanceStorageSupported, NeuronInfo; as recorded
in moto 5.2.5, with which a test compares them).
Its MiB of a GPU can be less than the round number on a data sheet. Trainium2's memory and logical
NeuronCores (two physical ones each, the default) are those of the AWS Neuron documentation, "Amazon
EC2 Trn2 Architecture": the API tells another figure. The degrees of NeuronCores are those over
which the Neuron runtime's collectives work.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lmi_multi.errors import OptionError

if TYPE_CHECKING:
    from lmi_multi.checkpoint.layout import QuantizeName

GIB = 2**30
Accelerator = Literal["cuda", "neuron"]
# What a backend cannot run, and why.
REFUSED: dict[tuple[Accelerator, QuantizeName], str] = {
    ("neuron", "fp8"): "NeuronCores run no fp8 weights, as their e4m3 is another type than e4m3fn",
}
_MIB = 2**20


@dataclass(frozen=True)
class Instance:
    """One type. `devices` are what a tensor-parallel rank runs on: GPUs, or logical NeuronCores.

    `device_bytes` is the memory of each, a NeuronCore's being its share of the chip's;
    `host_bytes` the memory of the machine; `degrees` the numbers of ranks that can work together;
    `has_disk` says that the machine has disks of its own, in place of a volume over the network.
    """

    name: str
    backend: Accelerator
    device: str
    devices: int
    device_bytes: int
    host_bytes: int
    degrees: tuple[int, ...]
    has_disk: bool = True

    @property
    def size(self) -> tuple[int, int, str]:
        """What "smaller" means: memory of all devices, then of the host. Prices are not known."""
        return self.devices * self.device_bytes, self.host_bytes, self.name


def _gpus(name: str, device: str, count: int, mib: int, host_gib: int) -> Instance:
    degrees = tuple(range(1, count + 1))
    return Instance(name, "cuda", device, count, mib * _MIB, host_gib * GIB, degrees)


def _cores(
    name: str, device: str, count: int, gib: int, host_gib: int, degrees: tuple[int, ...]
) -> Instance:
    possible = tuple(degree for degree in degrees if degree <= count)
    disk = not name.startswith("inf2.")
    return Instance(name, "neuron", device, count, gib * GIB, host_gib * GIB, possible, disk)


_A10G, _L4, _L40S = ("A10G", 22_888), ("L4", 22_888), ("L40S", 45_776)
_INF2, _TRN1, _TRN2 = (1, 2, 4, 8, 24), (1, 2, 8, 16, 32), (1, 2, 4, 8, 16, 32, 64)
# Sizes of the G families: name, GPUs, GiB of host memory of g5 and g6 (g6e has twice as much).
_SIZES = (
    ("xlarge", 1, 16),
    ("2xlarge", 1, 32),
    ("4xlarge", 1, 64),
    ("8xlarge", 1, 128),
    ("16xlarge", 1, 256),
    ("12xlarge", 4, 192),
    ("24xlarge", 4, 384),
    ("48xlarge", 8, 768),
)

INSTANCES: tuple[Instance, ...] = (
    *(_gpus(f"g5.{size}", _A10G[0], n, _A10G[1], host) for size, n, host in _SIZES),
    *(_gpus(f"g6.{size}", _L4[0], n, _L4[1], host) for size, n, host in _SIZES),
    *(_gpus(f"g6e.{size}", _L40S[0], n, _L40S[1], 2 * host) for size, n, host in _SIZES),
    _gpus("p4d.24xlarge", "A100", 8, 40_960, 1152),
    _gpus("p4de.24xlarge", "A100", 8, 81_920, 1152),
    _gpus("p5.4xlarge", "H100", 1, 81_920, 256),
    _gpus("p5.48xlarge", "H100", 8, 81_920, 2048),
    _gpus("p5e.48xlarge", "H200", 8, 144_384, 2048),
    _gpus("p5en.48xlarge", "H200", 8, 144_384, 2048),
    _cores("inf2.xlarge", "Inferentia2 core", 2, 16, 16, _INF2),
    _cores("inf2.8xlarge", "Inferentia2 core", 2, 16, 128, _INF2),
    _cores("inf2.24xlarge", "Inferentia2 core", 12, 16, 384, _INF2),
    _cores("inf2.48xlarge", "Inferentia2 core", 24, 16, 768, _INF2),
    _cores("trn1.2xlarge", "Trainium core", 2, 16, 32, _TRN1),
    _cores("trn1.32xlarge", "Trainium core", 32, 16, 512, _TRN1),
    _cores("trn1n.32xlarge", "Trainium core", 32, 16, 512, _TRN1),
    _cores("trn2.3xlarge", "Trainium2 core", 4, 24, 128, _TRN2),
    _cores("trn2.48xlarge", "Trainium2 core", 64, 24, 2048, _TRN2),
)


def find(name: str) -> Instance:
    """The type called `name`, with or without SageMaker's `ml.` before it.

    Raises OptionError that names the nearest one.
    """
    known = {instance.name: instance for instance in INSTANCES}
    plain = name.strip().lower().removeprefix("ml.")
    if plain in known:
        return known[plain]
    near = difflib.get_close_matches(plain, known, 1, cutoff=0.0)[0]
    families = ", ".join(dict.fromkeys(instance.partition(".")[0] for instance in known))
    raise OptionError(f"instance is {name!r}; did you mean {near!r}? Known are sizes of {families}")
