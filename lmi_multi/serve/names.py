"""Under which names an option is known, and which options of other servers have no effect here.

Three sources speak of options: a command line, a file of properties, environment variables. Each
becomes a mapping from fields of `ServeSettings` to what was given, in the words of its user.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lmi_multi.errors import OptionError

log = logging.getLogger(__name__)

DJL_PACKAGE = "djl_python."
"""Where DJL keeps the handlers that it brings along."""
DOCUMENT = "docs/configuration.md"
TYPO = 0.85
"""A variable of a shared prefix that is as close as this to a known one is taken for a slip."""


@dataclass(frozen=True)
class Option:
    """A field of the settings, and what it is called elsewhere.

    A property `option.name` is also the variable OPTION_NAME, a property without the prefix
    SERVING_NAME; `variables` are further ones. Of several variables that are set, the first
    counts, in this order.
    """

    field: str
    properties: tuple[str, ...]
    variables: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ineffective:
    """What other servers know and this one does not need: accepted with a logged line, if its
    value is one of `allowed`, where there are any."""

    properties: tuple[str, ...]
    why: str
    variables: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Given:
    """A value, and what its user called it."""

    label: str
    value: object

    def converted(self) -> object:
        """The value in the unit of its field."""
        unit = UNITS.get(self.label)
        text = str(self.value).strip()
        if unit is None or re.fullmatch(r"[0-9]{1,9}", text) is None:
            return self.value
        return int(text) * unit.size

    def allowed(self, otherwise: str) -> str:
        """What is allowed, in the unit that was used."""
        unit = UNITS.get(self.label)
        return otherwise if unit is None else unit.allowed


@dataclass(frozen=True)
class Unit:
    """A name whose values count something larger than its field does."""

    size: int
    allowed: str


UNITS = {"SAGEMAKER_MAX_PAYLOAD_IN_MB": Unit(2**20, "an integer from 1 to 1024")}

OPTIONS = (
    Option("model", ("option.model_id", "option.s3url", "option.model"), ("HF_MODEL_ID",)),
    Option("revision", ("option.revision",), ("HF_REVISION", "HF_MODEL_REVISION")),
    Option("verify", ("option.verify",)),
    Option("backend", ("option.backend",)),
    Option("engine", ("engine", "option.engine")),
    Option("fallback", ("option.fallback",)),
    Option("task", ("option.task",), ("HF_TASK",)),
    Option("rolling_batch", ("option.rolling_batch",)),
    Option("entry_point", ("option.entryPoint", "option.entry_point")),
    Option("dtype", ("option.dtype", "option.amp")),
    Option("quantize", ("option.quantize",)),
    Option(
        "tensor_parallel",
        ("option.tensor_parallel_degree", "option.tensor_parallel"),
        ("TENSOR_PARALLEL_DEGREE",),
    ),
    Option("pipeline_parallel", ("option.pipeline_parallel_degree", "option.pipeline_parallel")),
    Option("max_batch", ("option.max_rolling_batch_size", "option.max_batch")),
    Option("max_tokens", ("option.n_positions", "option.max_model_len", "option.max_tokens")),
    Option("memory_share", ("option.gpu_memory_utilization", "option.memory_share")),
    Option("prefix_caching", ("option.prefix_caching", "option.enable_prefix_caching")),
    Option("host", ("option.host",)),
    Option("port", ("option.port",), ("SAGEMAKER_BIND_TO_PORT",)),
    # Not in a file that travels with a model, nor on a command line that `ps` shows.
    Option("api_key", (), ("LMI_MULTI_API_KEY",)),
    Option("api_key_file", ("option.api_key_file",)),
    Option(
        "max_queue", ("job_queue_size", "option.max_queue"), ("SAGEMAKER_MODEL_JOB_QUEUE_SIZE",)
    ),
    Option("max_queue_tokens", ("option.max_queue_tokens",)),
    Option(
        "max_body_bytes",
        ("option.max_body_bytes",),
        ("SAGEMAKER_MAX_REQUEST_SIZE", "SAGEMAKER_MAX_PAYLOAD_IN_MB"),
    ),
    Option(
        "request_timeout",
        ("option.predict_timeout", "option.request_timeout"),
        ("SAGEMAKER_MODEL_SERVER_TIMEOUT_SECONDS",),
    ),
    Option(
        "startup_timeout",
        ("option.model_loading_timeout", "option.startup_timeout"),
        ("SAGEMAKER_STARTUP_TIMEOUT",),
    ),
    Option("step_timeout", ("option.step_timeout",)),
    Option("drain_timeout", ("option.drain_timeout",)),
    Option("log_format", ("option.log_format",), ("LMI_MULTI_LOG_FORMAT",)),
    Option("log_level", ("option.log_level",), ("LMI_MULTI_LOG_LEVEL",)),
    Option("output_formatter", ("option.output_formatter",)),
    Option("enable_streaming", ("option.enable_streaming",)),
    Option("default_accept", ("option.default_accept",), ("SAGEMAKER_DEFAULT_INVOCATIONS_ACCEPT",)),
    Option(
        "max_concurrent_transforms",
        ("option.max_concurrent_transforms",),
        ("SAGEMAKER_MAX_CONCURRENT_TRANSFORMS",),
    ),
    Option("batch_strategy", ("option.batch_strategy",), ("SAGEMAKER_BATCH_STRATEGY",)),
    Option("batch_transform", ("option.batch_transform",), ("SAGEMAKER_BATCH",)),
    Option("multi_model", ("option.multi_model",), ("SAGEMAKER_MULTI_MODEL",)),
    Option("models_root", ("option.models_root",)),
    Option("models_bytes", ("option.models_bytes",)),
)

_BATCHES = "requests join and leave the running batch at every step, so none is waited for"
_COMPILER = "a setting of another Neuron library's compiler, which results do not depend on"
_MEMORY = "weights are read tensor by tensor from mapped files"
_ONE_WORKER = "one engine serves all requests"

INEFFECTIVE = (
    Ineffective(("batch_size", "option.batch_size"), _BATCHES),
    Ineffective(("max_batch_delay", "option.max_batch_delay"), _BATCHES),
    Ineffective(("max_idle_time",), "the engine is never scaled down"),
    Ineffective(("option.max_rolling_batch_prefill_tokens",), "a step's tokens are bounded anyway"),
    Ineffective(("option.parallel_loading",), "ranks always load at the same time"),
    Ineffective(("option.unroll",), _COMPILER),
    Ineffective(("option.neuron_optimize_level",), _COMPILER),
    Ineffective(
        ("option.compiled_graph_path",),
        "compiled graphs are kept where NEURON_COMPILE_CACHE_URL says",
    ),
    Ineffective(
        ("option.save_mp_checkpoint_path",),
        "a server writes no partitions; lmi-multi convert does, or the handler's partition",
    ),
    Ineffective(("option.mpi_mode",), "ranks are started without MPI"),
    Ineffective(("option.low_cpu_mem_usage",), _MEMORY),
    Ineffective(("option.device_map",), "ranks take the devices in order", allowed=("auto",)),
    Ineffective(
        ("option.trust_remote_code",),
        "code that comes with a checkpoint is never run",
        ("HF_MODEL_TRUST_REMOTE_CODE",),
    ),
    Ineffective(
        ("option.load_in_8bit",),
        "say option.quantize=int8 or fp8 for weights of 8 bits",
        allowed=("false",),
    ),
    Ineffective(
        ("minWorkers", "maxWorkers", "gpu.minWorkers", "gpu.maxWorkers"),
        _ONE_WORKER,
        ("SAGEMAKER_NUM_MODEL_WORKERS", "SAGEMAKER_MODEL_SERVER_WORKERS"),
        allowed=("1",),
    ),
    Ineffective(
        (),
        "one server serves one model, unless SAGEMAKER_MULTI_MODEL is true",
        ("SERVING_LOAD_MODELS",),
        allowed=tuple(
            f"{prefix}{engine}=/opt/ml/model"
            for prefix in ("test::", "")
            for engine in ("Python", "MPI", "DeepSpeed", "FasterTransformer")
        ),
    ),
)

Known = Option | Ineffective


def variables(known: Known) -> tuple[str, ...]:
    """Every environment variable that means `known`, the one that counts most first."""
    return (*dict.fromkeys(map(_variable, known.properties)), *known.variables)


def of_command_line(given: Mapping[str, object]) -> dict[str, Given]:
    """Options by field name, or by a property's; one that is None was not given."""
    fields = {option.field: option for option in OPTIONS if option.properties}
    known: dict[str, Known] = {**_by_property(), **fields}
    found: dict[str, Given] = {}
    for name, value in given.items():
        if value is None:
            continue
        label = _flag(name) if name in fields else name
        _add_once(found, _known(name, known), Given(label, value))
    return found


def of_file(given: Mapping[str, str]) -> dict[str, Given]:
    """Options by property name. Two names of one option must agree."""
    found: dict[str, Given] = {}
    for name, value in given.items():
        _add_once(found, _known(name, _by_property()), Given(name, value))
    return found


def of_environment(environ: Mapping[str, str]) -> dict[str, Given]:
    """Options by variable; one that is empty is not set.

    OPTION_* are ours alone: an unknown one is an error. Of SAGEMAKER_* and SERVING_*, which the
    platform and other servers set too, only what looks like a slip is.
    """
    known = _by_variable()
    found: dict[str, Given] = {}
    for name, entry in known.items():
        value = environ.get(name, "")
        if not value.strip():
            continue
        given = Given(name, value)
        if isinstance(entry, Option) and entry.field in found:
            # An image, the platform and its user may each set one: not a contradiction.
            log.warning("%s has no effect: %s is set", name, found[entry.field].label)
        else:
            _add_once(found, entry, given)
    for name in sorted(environ.keys() - known.keys()):
        _judge_unknown_variable(name, known)
    return found


def shown(value: object) -> str:
    """`repr` on one line, cut where it gets long."""
    text = " ".join(repr(str(value) if isinstance(value, Path) else value).split())
    return text if len(text) <= 120 else text[:117] + "..."


def _judge_unknown_variable(name: str, known: Mapping[str, Known]) -> None:
    if name.startswith("OPTION_"):
        raise unknown(name, [entry for entry in known if entry.startswith("OPTION_")])
    if name.startswith(("SAGEMAKER_", "SERVING_")):
        if difflib.get_close_matches(name, known, 1, TYPO):
            raise unknown(name, known)
        log.info("%s has no effect: not an option of this server", name)


def _add_once(found: dict[str, Given], known: Known, given: Given) -> None:
    if isinstance(known, Ineffective):
        _accept(known, given)
        return
    other = found.setdefault(known.field, given)
    if other.value != given.value:
        raise OptionError(
            f"{given.label} is {shown(given.value)}, yet {other.label}, which means the same, is "
            f"{shown(other.value)}; allowed: one of them"
        )


def _accept(known: Ineffective, given: Given) -> None:
    text = str(given.value).strip()
    allowed = [value.casefold() for value in known.allowed]
    if allowed and text.casefold().rstrip("/") not in allowed:
        raise OptionError(
            f"{given.label} is {shown(given.value)}; allowed: {', '.join(known.allowed)} "
            f"({known.why})"
        )
    log.warning("%s has no effect: %s", given.label, known.why)


def _known(name: str, known: Mapping[str, Known]) -> Known:
    if name not in known:
        raise unknown(name, known)
    return known[name]


def unknown(name: str, known: Iterable[str]) -> OptionError:
    """The error of a name that is not `known`; it names the nearest one that is, if any is
    near."""
    near = _nearest(name, known)
    guess = f"; did you mean {near!r}?" if near else ";"
    return OptionError(f"unknown option {shown(name)}{guess} {DOCUMENT} lists all")


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` resembles most, whatever its case and prefix, or None."""
    bare = {_bare(entry): entry for entry in known}
    found = difflib.get_close_matches(_bare(name), bare, 1)
    return bare[found[0]] if found else None


def _bare(name: str) -> str:
    folded = name.casefold()
    return folded.removeprefix("option.").removeprefix("option_").replace("-", "_")


def _flag(field: str) -> str:
    return "MODEL" if field == "model" else "--" + field.replace("_", "-")


def _variable(name: str) -> str:
    bare = name.removeprefix("option.")
    prefix = "SERVING_" if bare == name else "OPTION_"
    return prefix + bare.replace(".", "_").upper()


@cache
def _by_property() -> dict[str, Known]:
    return {name: known for known in (*OPTIONS, *INEFFECTIVE) for name in known.properties}


@cache
def _by_variable() -> dict[str, Known]:
    return {name: known for known in (*OPTIONS, *INEFFECTIVE) for name in variables(known)}
