"""From what a user asks for to a deployment whose settings are valid and whose model fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lmi_multi.checkpoint.files import gib
from lmi_multi.checkpoint.s3.address import Address, is_address
from lmi_multi.checkpoint.source import DEMO, is_local
from lmi_multi.deploy.deployment import MAX_VOLUME, Deployment, name_for
from lmi_multi.errors import CapacityError, OptionError
from lmi_multi.fit import Network, Option, read_network, report
from lmi_multi.instances import GIB, INSTANCES, Instance, find
from lmi_multi.serve.settings import ServeSettings

VARIABLES = {
    "model": "OPTION_MODEL_ID",
    "revision": "OPTION_REVISION",
    "dtype": "OPTION_DTYPE",
    "quantize": "OPTION_QUANTIZE",
    "tensor_parallel": "OPTION_TENSOR_PARALLEL_DEGREE",
    "pipeline_parallel": "OPTION_PIPELINE_PARALLEL_DEGREE",
    "memory_share": "OPTION_MEMORY_SHARE",
    "max_batch": "OPTION_MAX_ROLLING_BATCH_SIZE",
    "max_tokens": "OPTION_MAX_MODEL_LEN",
    "startup_timeout": "OPTION_MODEL_LOADING_TIMEOUT",
}
"""The container's variables for the server's settings that a deployment sets."""
_KEYS = ("LMI_MULTI_API_KEY", "OPTION_API_KEY_FILE")
_SCRIPTS = ("OPTION_ENTRYPOINT", "OPTION_ENTRY_POINT")
_SPARE = 20 * GIB  # of a volume, for everything but models


def prepare(
    model: str,
    instance: str,
    *,
    settings: Mapping[str, Any],
    environment: Mapping[str, str],
    check: bool = True,
    **fields: Any,
) -> tuple[Deployment, Option | None]:
    """A deployment, and the estimate by which it fits.

    `settings` are fields of ServeSettings, None for those that are not given; `environment` are
    further variables of the container; `fields` those of Deployment. Without tensor_parallel the
    least degree is taken that fits. The model's headers are read, from S3 or the Hub; with
    `check=False` nothing is, and the estimate is None.

    Raises OptionError for what is not allowed, CapacityError if the model does not fit, and the
    errors of `read_network`.
    """
    _check_source(model)
    given = {name: value for name, value in settings.items() if value is not None}
    if not is_address(model):
        given["model"] = model
    machine = find(instance)
    fields = {"name": name_for(model)} | {n: v for n, v in fields.items() if v is not None}
    deployment = Deployment(model=model, instance=machine, **fields)
    given["startup_timeout"] = deployment.startup_timeout
    variables = _variables(given, environment)
    wanted = _settings(model, variables)
    if not check:
        return deployment.model_copy(update={"environment": variables}), None
    network = read_network(model, settings.get("revision"))
    option = place(network, machine, wanted)
    variables[VARIABLES["tensor_parallel"]] = str(option.tensor_parallel)
    update: dict[str, Any] = {"environment": variables}
    if deployment.volume is None and not machine.has_disk:
        update["volume"] = volume(network, option)
    return deployment.model_copy(update=update), option


def place(network: Network, instance: Instance, settings: ServeSettings) -> Option:
    """How the model would run there: at the degree of `settings`, or at the least that fits, over
    its pipeline stages.

    Raises CapacityError if it does not fit, OptionError for a degree, stages or a format that are
    impossible.
    """
    dtype = network.dtype if settings.dtype == "auto" else settings.dtype
    quantize = settings.quantize or (network.quantize if network.is_artifact else None)
    if (dtype, quantize) not in network.formats():
        raise OptionError(
            f"dtype is {dtype!r} and quantize {quantize!r}, but {network.source} was converted "
            f"with {network.dtype!r} and {network.quantize!r}; convert its source again"
        )
    if settings.memory_share is not None and instance.backend != "cuda":
        raise OptionError(
            f"memory_share is {settings.memory_share}; allowed on ml.{instance.name}: nothing, as "
            "it is for GPUs"
        )
    stages = settings.pipeline_parallel
    [found] = report(
        network, (instance,), settings.max_tokens, settings.memory_share, stages
    ).instances
    options = [o for o in found.options if (o.dtype, o.quantize) == (dtype, quantize)]
    if not options:
        most = instance.devices if instance.backend == "cuda" else 1
        raise OptionError(
            f"pipeline_parallel is {stages}; allowed on ml.{instance.name}: an integer from 1 to "
            f"{most}"
        )
    degree = _degree(settings, instance, [o.tensor_parallel for o in options])
    options = [o for o in options if degree in (None, o.tensor_parallel)]
    best = next((o for o in options if o.fits), None)
    if best is not None:
        return best
    last = options[-1]
    raise CapacityError(
        f"{network.source} does not fit ml.{instance.name} at tensor_parallel "
        f"{last.tensor_parallel}: {last.reason}; {_elsewhere(network, settings, last)}"
    )


def _degree(settings: ServeSettings, instance: Instance, possible: list[int]) -> int | None:
    """The degree that was asked for, if one was."""
    if "tensor_parallel" not in settings.model_fields_set:
        return None
    asked = settings.tensor_parallel
    degree = instance.devices // settings.pipeline_parallel if asked == "max" else asked
    if degree not in possible:
        raise OptionError(
            f"tensor_parallel is {asked}; allowed for this model on ml.{instance.name}: "
            f"{', '.join(map(str, possible))}"
        )
    return degree


def _elsewhere(network: Network, settings: ServeSettings, option: Option) -> str:
    """What would do instead."""
    own = (option.dtype, option.quantize)
    found = report(
        network, INSTANCES, settings.max_tokens, settings.memory_share, option.pipeline_parallel
    )
    for best in found.smallest:
        if (best.dtype, best.quantize) == own:
            return f"it fits ml.{best.instance} at tensor_parallel {best.tensor_parallel}"
    return "no instance takes it in this format"


def volume(network: Network, option: Option) -> int:
    """GiB of a volume that holds the model, and the artifact if it has to be converted first.

    Raises OptionError if that is more than SageMaker allows.
    """
    copies = 1 if network.is_artifact else 2
    ranks = option.tensor_parallel * option.pipeline_parallel
    size = copies * option.weight_bytes * ranks + _SPARE
    if size > MAX_VOLUME * GIB:
        raise OptionError(
            f"volume is not given, and the model needs {gib(size)}; allowed: {MAX_VOLUME} GiB; "
            "convert it first"
        )
    return math.ceil(size / GIB)


def _check_source(model: str) -> None:
    if is_address(model):
        Address.parse(model)
    elif is_local(model) and model != DEMO:
        raise OptionError(
            f"MODEL is {model!r}, which an endpoint cannot reach; allowed: s3://BUCKET/PREFIX, to "
            f"which `lmi-multi convert {model} s3://...` uploads it, a Hub id, or {DEMO}"
        )


def _variables(given: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, str]:
    made = {VARIABLES[name]: str(value) for name, value in given.items()}
    for name in _KEYS:
        if name in environment:
            raise OptionError(
                f"{name} is set for the container; allowed: no key, as SageMaker passes no "
                "Authorization header on: IAM says who may invoke an endpoint"
            )
    for name in made.keys() & environment.keys():
        raise OptionError(
            f"{name} is {environment[name]!r:.80}, yet an option sets it to {made[name]!r}; "
            "allowed: one of them"
        )
    return made | dict(environment)


def _settings(model: str, variables: Mapping[str, str]) -> ServeSettings:
    """What the server will make of the variables; a script is looked for only there."""
    environ = {name: value for name, value in variables.items() if name not in _SCRIPTS}
    environ.pop(VARIABLES["model"], None)
    return ServeSettings.read(command_line={"model": model}, environ=environ)
