"""The instance types with NeuronCores: how many cores, how much memory, which degrees."""

from __future__ import annotations

from dataclasses import dataclass

from lmi_multi.errors import CapacityError, OptionError
from lmi_multi.models.schema import valid_degrees
from lmi_multi.models.spec import ModelSpec

# The runtime's collectives span these many cores; 4 is no ring on trn1.
DEGREES = {"inf2": (1, 2, 4, 8, 24), "trn1": (1, 2, 8, 16, 32), "trn2": (1, 2, 4, 8, 16, 32, 64)}


@dataclass(frozen=True)
class Instance:
    """`cores` are logical ones, `memory` is GiB of all devices together."""

    name: str
    cores: int
    memory: int

    @property
    def generation(self) -> str:
        """inf2, trn1 or trn2."""
        return self.name.partition(".")[0].replace("trn1n", "trn1")

    @property
    def core_memory(self) -> float:
        """GiB of one core."""
        return self.memory / self.cores

    @property
    def degrees(self) -> tuple[int, ...]:
        """The tensor-parallel degrees that this instance can run."""
        return tuple(n for n in DEGREES[self.generation] if n <= self.cores)


INSTANCES = {
    instance.name: instance
    for instance in (
        Instance("inf2.xlarge", 2, 32),
        Instance("inf2.8xlarge", 2, 32),
        Instance("inf2.24xlarge", 12, 192),
        Instance("inf2.48xlarge", 24, 384),
        Instance("trn1.2xlarge", 2, 32),
        Instance("trn1.32xlarge", 32, 512),
        Instance("trn1n.32xlarge", 32, 512),
        Instance("trn2.48xlarge", 64, 1536),
    )
}


def find(name: str) -> Instance:
    """The instance type called `name`. Raises OptionError that lists the known ones."""
    if name not in INSTANCES:
        raise OptionError(f"instance is {name!r}, must be one of {', '.join(INSTANCES)}")
    return INSTANCES[name]


def check(spec: ModelSpec, instance: Instance, degree: int) -> None:
    """Raise OptionError that lists what is valid unless `degree` cores of `instance` can share
    the network."""
    if degree not in instance.degrees:
        valid = ", ".join(map(str, instance.degrees))
        raise OptionError(
            f"tensor_parallel is {degree}, but {instance.name} has {instance.cores} NeuronCores "
            f"and runs {valid}"
        )
    possible = valid_degrees(spec)
    if degree not in possible:
        both = ", ".join(str(n) for n in instance.degrees if n in possible)
        raise OptionError(
            f"tensor_parallel is {degree}, but heads {spec.heads}, kv_heads {spec.kv_heads} and "
            f"ffn {spec.ffn} can be split on {instance.name} over {both}"
        )


def check_memory(instance: Instance, degree: int, needed: int, fitting: str) -> None:
    """Raise CapacityError with the shortfall if a core needs more than its bytes; `fitting` says
    what would fit."""
    have = int(instance.core_memory * 2**30)
    if needed > have:
        raise CapacityError(
            f"each of {degree} cores of {instance.name} needs {needed / 2**30:.2f} GiB and has "
            f"{have / 2**30:.0f}: {(needed - have) / 2**30:.2f} GiB too little; {fitting}"
        )
