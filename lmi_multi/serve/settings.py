"""How a server runs: one validated object, read from command line, file and environment."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    StrictBool,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lmi_multi.errors import OptionError
from lmi_multi.serve import sources
from lmi_multi.serve.names import DJL_PACKAGE, Given, shown, unknown
from lmi_multi.values import Float, Int

MIB = 2**20
MAX_SECONDS = 3600.0
"""The longest that SageMaker waits for anything."""

_DJL_HANDLERS = (
    "fastertransformer",
    "huggingface",
    "deepspeed",
    "transformers_neuronx",
    "transformers-neuronx",
    "transformersneuronx",
    "tensorrt_llm",
    "lmi_vllm.vllm_async_service",
    "lmi_trtllm.trtllm_async_service",
)
_KEY = re.compile(r"[!-~]{1,4096}")


def _text(value: object) -> object:
    return value.strip() if isinstance(value, str) else value


def _integer(value: object) -> object:
    text = _text(value)
    return int(text) if isinstance(text, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", text) else text


def _number(value: object) -> object:
    text = _text(value)
    plain = isinstance(text, str) and re.fullmatch(r"[+-]?[0-9]{1,18}(\.[0-9]{1,18})?", text)
    return float(str(text)) if plain else text


def _choose(meanings: Mapping[str, object], value: object) -> object:
    """What a word means, whatever its case; an unknown one stays, and is refused later."""
    text = _text(value)
    return meanings.get(text.casefold(), text) if isinstance(text, str) else text


def _words(*same: str, **other: object) -> BeforeValidator:
    meanings = {word.casefold(): word for word in same} | other
    return BeforeValidator(partial(_choose, meanings))


def _handler(value: object) -> object:
    """None for DJL's own handlers, which our engine stands in for."""
    text = _text(str(value) if isinstance(value, Path) else value)
    if isinstance(text, str):
        if text.removeprefix(DJL_PACKAGE) in _DJL_HANDLERS and text.startswith(DJL_PACKAGE):
            return None
        if not text.endswith(".py"):
            raise ValueError("neither a script nor a handler that is known")
    return text


def _model(value: object) -> object:
    text = _text(str(value) if isinstance(value, Path) else value)
    if isinstance(text, str) and (not text or re.fullmatch(r"s3:(?!//[^/]).*", text)):
        raise ValueError("empty, or S3 without a bucket")
    return text


def _key(value: object) -> object:
    text = value.get_secret_value() if isinstance(value, SecretStr) else _text(value)
    if isinstance(text, str) and not _KEY.fullmatch(text):
        raise ValueError("a header could not hold it")
    return text


def _optional(check: Callable[[object], object]) -> BeforeValidator:
    return BeforeValidator(lambda value: None if value is None else check(value))


_Text = Annotated[str, BeforeValidator(_text), Field(min_length=1)]
_Integer = Annotated[Int, BeforeValidator(_integer)]
_Count = Annotated[_Integer, Field(ge=1, lt=2**31)]
_Flag = Annotated[
    StrictBool,
    BeforeValidator(partial(_choose, {"true": True, "false": False, "1": True, "0": False})),
]
_Seconds = Annotated[Float, BeforeValidator(_number), Field(gt=0, le=MAX_SECONDS)]

_COUNT = "an integer, at least 1"
_FLAG = "true or false"
_SECONDS = f"a number of seconds above 0 and at most {MAX_SECONDS:.0f}"


class _FieldError(OptionError):
    """A field's value that is not allowed; `read` says it again in the user's words."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(_worded(field, Given(field, value), allowed))
        self.field, self.value, self.allowed = field, value, allowed


class ServeSettings(BaseModel):
    """Everything a server is told. `docs/configuration.md` says what each field means, and how
    it is called in files and variables.

    Raises OptionError, one line, for an unknown name or a value that is not allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Annotated[str | None, _optional(_model)] = Field(
        default=None, description="a folder, a Hub id, s3://BUCKET/PREFIX, or demo"
    )
    revision: _Text | None = Field(default=None, description="a branch, tag or commit")
    verify: _Flag = Field(default=False, description=_FLAG)
    backend: Annotated[
        Literal["auto", "cuda", "neuron", "cpu"], _words("auto", "cuda", "neuron", "cpu")
    ] = Field(default="auto", description="auto, cuda, neuron or cpu")
    engine: Annotated[
        Literal["Python", "MPI", "DeepSpeed", "FasterTransformer", "Accelerate"],
        _words("Python", "MPI", "DeepSpeed", "FasterTransformer", "Accelerate"),
    ] = Field(
        default="Python",
        description="Python, MPI, DeepSpeed or FasterTransformer, which all mean this engine; "
        "Accelerate, which means option.fallback=transformers",
    )
    fallback: Annotated[Literal["transformers"] | None, _words("transformers")] = Field(
        default=None, description="transformers"
    )
    task: Annotated[
        Literal["auto", "text-generation", "text2text-generation", "feature-extraction"],
        _words(
            "auto",
            "text-generation",
            "text2text-generation",
            "feature-extraction",
            **{"text-embedding": "feature-extraction", "conversational": "text-generation"},
        ),
    ] = Field(
        default="auto",
        description="auto, text-generation, conversational, text2text-generation, "
        "feature-extraction or text-embedding",
    )
    rolling_batch: Annotated[
        Literal["auto"],
        _words("auto", **dict.fromkeys(("scheduler", "vllm", "lmi-dist", "trtllm"), "auto")),
    ] = Field(
        default="auto",
        description="auto, scheduler, vllm, lmi-dist or trtllm, which all mean this engine; "
        "requests are always batched continuously",
    )
    entry_point: Annotated[Path | None, _optional(_handler)] = Field(
        default=None,
        description="a Python file, or one of DJL's handlers of text: "
        + ", ".join(DJL_PACKAGE + name for name in _DJL_HANDLERS),
    )
    dtype: Annotated[
        Literal["auto", "fp32", "fp16", "bf16"],
        _words(
            *("auto", "fp32", "fp16", "bf16"),
            **dict.fromkeys(("f32", "float32"), "fp32"),
            **dict.fromkeys(("f16", "float16"), "fp16"),
            bfloat16="bf16",
        ),
    ] = Field(
        default="auto",
        description="auto, fp32, fp16, bf16, or int8 or fp8, which mean option.quantize",
    )
    quantize: Annotated[Literal["int8", "fp8"] | None, _words("int8", "fp8")] = Field(
        default=None, description="int8, fp8, or nothing"
    )
    tensor_parallel: Annotated[Literal["max"], _words("max")] | _Count = Field(
        default=1, description=f"{_COUNT}, or max"
    )
    pipeline_parallel: _Count = Field(default=1, description=_COUNT)
    max_batch: _Count | None = Field(default=None, description=_COUNT)
    max_tokens: _Count | None = Field(default=None, description=_COUNT)
    memory_share: Annotated[Float, BeforeValidator(_number), Field(gt=0, le=1)] | None = Field(
        default=None, description="a number above 0 and at most 1"
    )
    prefix_caching: _Flag = Field(default=True, description=_FLAG)

    host: Annotated[_Text, Field(pattern=r"^\S+$")] = Field(
        default="127.0.0.1", description="an address or a host name"
    )
    port: Annotated[_Integer, Field(ge=0, le=65535)] = Field(
        default=8080, description="an integer from 0 (any that is free) to 65535"
    )
    api_key: Annotated[SecretStr | None, _optional(_key)] = Field(
        default=None, description="1 to 4096 visible ASCII characters, no spaces"
    )
    max_queue: _Count = Field(default=1000, description=_COUNT)
    max_queue_tokens: _Count = Field(default=2**20, description=_COUNT)
    max_body_bytes: Annotated[_Integer, Field(ge=1024, le=1024 * MIB)] = Field(
        default=6 * MIB, description=f"an integer from 1024 to {1024 * MIB} (1 GiB)"
    )
    request_timeout: _Seconds = Field(default=60.0, description=_SECONDS)
    startup_timeout: _Seconds = Field(default=1800.0, description=_SECONDS)
    step_timeout: _Seconds = Field(default=30.0, description=_SECONDS)
    drain_timeout: _Seconds = Field(default=25.0, description=_SECONDS)

    log_format: Annotated[Literal["text", "json"], _words("text", "json")] = Field(
        default="text", description="text or json"
    )
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], _words("debug", "info", "warning", "error")
    ] = Field(default="info", description="debug, info, warning or error")
    output_formatter: Annotated[
        Literal["json", "jsonlines", "sse"], _words("json", "jsonlines", "sse")
    ] = Field(default="json", description="json, jsonlines or sse")
    enable_streaming: Annotated[_Flag, _words(huggingface=True)] = Field(
        default=False, description=_FLAG
    )
    default_accept: Annotated[
        Literal["application/json", "application/jsonlines", "text/event-stream"] | None,
        _words("application/json", "application/jsonlines", "text/event-stream"),
    ] = Field(
        default=None,
        description="application/json, application/jsonlines or text/event-stream",
    )
    max_concurrent_transforms: _Count | None = Field(default=None, description=_COUNT)
    batch_strategy: Annotated[
        Literal["SINGLE_RECORD", "MULTI_RECORD"],
        _words(
            *("SINGLE_RECORD", "MULTI_RECORD"),
            singlerecord="SINGLE_RECORD",
            multirecord="MULTI_RECORD",
        ),
    ] = Field(default="MULTI_RECORD", description="SINGLE_RECORD or MULTI_RECORD")
    batch_transform: _Flag = Field(default=False, description=_FLAG)
    multi_model: _Flag = Field(default=False, description=_FLAG)
    models_root: Path = Field(default=Path("/opt/ml/models"), description="a folder")
    models_bytes: Annotated[_Integer, Field(ge=MIB, lt=2**63)] | None = Field(
        default=None, description=f"an integer, at least {MIB} (1 MiB)"
    )

    if not TYPE_CHECKING:  # type checkers see the fields as keywords

        def __init__(self, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise _judged(error) from None

    @model_validator(mode="before")
    @classmethod
    def _translate(cls, fields: Any) -> Any:
        """Values that people have for one option and that mean another one here."""
        fields = dict(fields)
        if _folded(fields.get("engine")) == "accelerate" and fields.get("fallback") is None:
            fields["fallback"] = "transformers"
        if (dtype := _folded(fields.get("dtype"))) in ("int8", "fp8"):
            fields["dtype"] = "auto"
            if fields.get("quantize") is None:
                fields["quantize"] = dtype
        return fields

    @model_validator(mode="after")
    def _one_engine_at_a_time(self) -> ServeSettings:
        if self.fallback is None:
            return self
        for field, free, allowed in (
            ("quantize", (None,), "nothing"),
            ("tensor_parallel", (1,), "1"),
            ("pipeline_parallel", (1,), "1"),
            ("max_batch", (None, 1), "1"),
            ("memory_share", (None,), "nothing"),
            ("verify", (False,), "false"),
        ):
            value = getattr(self, field)
            if value not in free:
                raise _rule(field, value, f"{allowed} beside option.fallback=transformers")
        return self

    @model_validator(mode="after")
    def _no_model_beside_many(self) -> ServeSettings:
        if self.multi_model and self.model is not None:
            raise _rule("model", self.model, "none beside multi_model, as requests name them")
        if self.multi_model and self.entry_point is not None:
            raise _rule("entry_point", self.entry_point, "none beside multi_model")
        return self

    @classmethod
    def read(
        cls,
        *,
        command_line: Mapping[str, object],
        properties: Path | None = None,
        environ: Mapping[str, str],
        folder: Path | None = None,
    ) -> ServeSettings:
        """Settings from a command line (by field name; None: not given), a file and variables.

        The command line counts first, then the file, then the environment, then the defaults.
        Without `properties`, a serving.properties in the model's folder is read: in the folder
        that the command line names, else in /opt/ml/model, else in the one a variable names. One of
        several models has a `folder` of its own: then it is read there.
        """
        given = sources.gather(command_line, properties, environ, folder)
        fields: dict[str, Any] = {field: entry.converted() for field, entry in given.items()}
        try:
            settings = cls(**fields)
        except _FieldError as error:
            entry = given.get(error.field, Given(error.field, error.value))
            allowed = entry.allowed(error.allowed)
            raise OptionError(_worded(error.field, entry, allowed)) from None
        if settings.model is None and not settings.multi_model and not settings.entry_point:
            raise OptionError(
                f"no model is named, and {sources.MODEL_FOLDER} does not exist; allowed: MODEL on "
                f"the command line, option.model_id in {sources.FILE}, or HF_MODEL_ID"
            )
        return settings

    def load_arguments(self) -> dict[str, Any]:
        """The keywords of `lmi_multi.load`.

        With tensor_parallel "max" the backend is asked for its devices here. Raises OptionError
        without a model, BackendError if the backend that is named cannot run here.
        """
        if self.model is None:
            raise OptionError("model is None; allowed: the settings of one model")
        keywords: dict[str, Any] = {
            "source": self.model,
            "backend": self.backend,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "tensor_parallel": self.degree(),
            "pipeline_parallel": self.pipeline_parallel,
            "max_batch": self.max_batch,
            "max_tokens": self.max_tokens,
            "memory_share": self.memory_share,
            "revision": self.revision,
            "verify": self.verify,
            "prefix_caching": self.prefix_caching,
        }
        return keywords if self.fallback is None else keywords | {"fallback": self.fallback}

    def degree(self) -> int:
        """Ranks that share each layer; "max": as many as there are devices for every stage."""
        if isinstance(self.tensor_parallel, int):
            return self.tensor_parallel
        from lmi_multi import backends  # imports torch, which reading settings does not need

        devices = len(backends.select(self.backend).probe().devices)
        return max(1, devices // self.pipeline_parallel)


def _folded(value: object) -> object:
    return value.strip().casefold() if isinstance(value, str) else value


def _rule(field: str, value: object, allowed: str) -> PydanticCustomError:
    """A breach of a rule over several fields, for `_judged`."""
    return PydanticCustomError("rule", "", {"field": field, "value": value, "allowed": allowed})


def _judged(error: ValidationError) -> OptionError:
    """The first failure as one line."""
    first = error.errors()[0]
    if first["type"] == "rule":
        return _FieldError(**first["ctx"])
    name, known = str(first["loc"][0]), ServeSettings.model_fields
    if name not in known:
        return unknown(name, known)
    return _FieldError(name, first["input"], str(known[name].description))


def _worded(field: str, given: Given, allowed: str) -> str:
    value = "not usable" if field == "api_key" else shown(given.value)
    return f"{given.label} is {value}; allowed: {allowed}"
