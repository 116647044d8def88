"""FasterTransformer's Python wrapper, answered by this package: `import fastertransformer as ft`
becomes `from lmi_multi import fastertransformer as ft`.

docs/fastertransformer.md tells what differs.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lmi_multi.checkpoint.artifact import is_artifact
from lmi_multi.checkpoint.convert import convert
from lmi_multi.checkpoint.formats import open_reader
from lmi_multi.checkpoint.source import resolve
from lmi_multi.errors import OptionError
from lmi_multi.fastertransformer.handles import GPTModel, InferenceModel, T5Model
from lmi_multi.model import load
from lmi_multi.models.registry import family_of
from lmi_multi.models.t5 import T5

__all__ = ["GPTModel", "InferenceModel", "T5Model", "init_inference", "save_checkpoint"]

log = logging.getLogger(__name__)

_LOADING: Final = ("backend", "max_batch", "max_tokens", "revision", "verify", "progress")
_SAVING: Final = ("revision", "progress")
# What told the original where its library is, and how many processes convert.
_POINTLESS: Final = ("lib_path", "num_convert_process")


def init_inference(
    model: str | Path,
    tensor_parallel_degree: int,
    pipeline_parallel_degree: int,
    dtype: str = "fp32",
    use_triton: bool | None = None,
    do_streaming: bool = False,
    is_peft: bool = False,
    **kwargs: Any,
) -> T5Model | GPTModel:
    """Load `model`: a folder, a Hub id, FasterTransformer's files, or what `save_checkpoint` wrote.

    `dtype` is "fp32", "fp16", "bf16" or "int8" (weights only). `do_streaming` needs no preparing
    here. Further keywords are those of `lmi_multi.load`: backend, max_batch, max_tokens, revision,
    verify, progress; `lib_path` and `num_convert_process` have nothing to do and are logged.

    Raises TypeError for any other keyword; OptionError (a ValueError), naming the argument, for
    Triton, PEFT and invalid values; and what `lmi_multi.load` raises.
    """
    _refuse(use_triton=use_triton, is_peft=is_peft)
    if not isinstance(do_streaming, bool):
        raise OptionError(f"do_streaming is {do_streaming!r:.80}, must be True or False")
    given = _keywords("init_inference", kwargs, _LOADING)
    tensor, pipeline = _degrees(tensor_parallel_degree, pipeline_parallel_degree)
    kind, quantize = _precision(model, dtype, given.get("revision"))
    loaded = load(
        model,
        dtype=kind,
        quantize=quantize,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        **given,
    )
    if loaded.spec.kind == "encoder":
        loaded.close()
        raise OptionError(f"model is a {loaded.spec.family}, which generates no text")
    return T5Model(loaded) if loaded.spec.kind == "encoder-decoder" else GPTModel(loaded)


def save_checkpoint(
    model: str | Path,
    tensor_parallel_degree: int,
    pipeline_parallel_degree: int,
    save_mp_checkpoint_path: str | Path,
    dtype: str = "fp32",
    **kwargs: Any,
) -> None:
    """Write `model` into the folder `save_mp_checkpoint_path`, which `init_inference` then loads.

    It becomes an artifact of this package, whole or not at all, that loads at any degree; pipeline
    stages read their own tensors from the same files.
    Further keywords are `revision` and `progress`; raises what `init_inference` raises.
    """
    _refuse(use_triton=kwargs.pop("use_triton", None), is_peft=kwargs.pop("is_peft", False))
    given = _keywords("save_checkpoint", kwargs, _SAVING)
    tensor, _ = _degrees(tensor_parallel_degree, pipeline_parallel_degree)
    kind, quantize = _precision(model, dtype, given.get("revision"))
    convert(
        model,
        save_mp_checkpoint_path,
        dtype=kind,
        quantize=quantize,
        tensor_parallel=tensor,
        **given,
    )


def _refuse(use_triton: object, is_peft: object) -> None:
    if use_triton not in (None, False):
        raise OptionError(
            "use_triton is set, but nothing here runs in Triton; leave it out: pipeline_generate "
            "and stream_generate work without"
        )
    if is_peft not in (None, False):
        raise OptionError(
            "is_peft is set, but adapters are not supported; merge them into the model first"
        )


def _keywords(function: str, given: Mapping[str, Any], known: tuple[str, ...]) -> dict[str, Any]:
    for name in given:
        if name not in (*known, *_POINTLESS):
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        if name in _POINTLESS:
            log.info("%s: no effect, as there is no such library or process here", name)
    return {name: value for name, value in given.items() if name in known}


def _degrees(tensor: Any, pipeline: Any) -> tuple[int, int]:
    """Both as integers. Raises OptionError for what is none."""
    degrees = []
    for name, value in (("tensor_parallel_degree", tensor), ("pipeline_parallel_degree", pipeline)):
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
            raise OptionError(f"{name} is {value!r:.80}, must be an integer, at least 1")
        degrees.append(operator.index(value))
    return degrees[0], degrees[1]


def _precision(model: str | Path, dtype: str, revision: str | None) -> tuple[str, str | None]:
    """This package's dtype and quantization.

    Beside int8 weights everything else was fp16. T5's activations do not fit fp16: it gets bf16.
    """
    if dtype in ("fp32", "fp16", "bf16"):
        return dtype, None
    if dtype != "int8":
        raise OptionError(f"dtype is {dtype!r:.80}, must be one of fp32, fp16, bf16, int8")
    folder = resolve(model, revision).folder
    if is_artifact(folder):
        return "auto", "int8"
    family = family_of(open_reader(folder).config().architecture)
    return ("bf16" if family is T5 else "fp16"), "int8"
