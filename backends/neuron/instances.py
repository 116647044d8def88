"""What the instance types with NeuronCores allow: which degrees."""

from __future__ import annotations

from lmi_multi import instances
from lmi_multi.errors import OptionError
from lmi_multi.instances import Instance
from lmi_multi.models.schema import valid_degrees
from lmi_multi.models.spec import ModelSpec


def find(name: str) -> Instance:
    """The instance type called `name`. Raises OptionError for one without NeuronCores."""
    found = instances.find(name)
    if found.backend != "neuron":
        known = ", ".join(i.name for i in instances.INSTANCES if i.backend == "neuron")
        raise OptionError(f"instance is {name!r}, must be one with NeuronCores: {known}")
    return found


def check(spec: ModelSpec | None, instance: Instance, degree: int) -> None:
    """Raise OptionError that lists what is valid unless `degree` cores of `instance` can share
    the network; without a spec, any network."""
    possible = instance.degrees if spec is None else valid_degrees(spec)
    both = ", ".join(str(n) for n in instance.degrees if n in possible)
    if degree not in instance.degrees:
        runs = "runs" if spec is None else "runs this model over"
        raise OptionError(
            f"tensor_parallel is {degree}, but {instance.name} has {instance.devices} NeuronCores "
            f"and {runs} {both}"
        )
    if spec is not None and degree not in possible:
        raise OptionError(
            f"tensor_parallel is {degree}, but heads {spec.heads}, kv_heads {spec.kv_heads} and "
            f"ffn {spec.ffn} can be split on {instance.name} over {both}"
        )
