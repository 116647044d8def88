"""Which engine a checkpoint gets, and what transformers knows of one that no family declares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmi_multi.checkpoint import fastertransformer
from lmi_multi.checkpoint.artifact import is_artifact
from lmi_multi.errors import CheckpointError, OptionError, UnsupportedModelError
from lmi_multi.models.config import Config
from lmi_multi.models.registry import family_of
from lmi_multi.models.spec import Kind
from lmi_multi.models.traits import Traits

NAME = "transformers"
# Under these names configs say how many positions their network has.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


def check_options(
    fallback: str,
    *,
    quantize: str | None,
    tensor_parallel: int,
    pipeline_parallel: int,
    max_batch: int | None,
    verify: bool,
    memory_share: float | None = None,
) -> None:
    """Raise OptionError for another fallback, and for an option that it does not carry."""
    if fallback != NAME:
        raise OptionError(f"fallback is {fallback!r:.80}; allowed: None or {NAME!r}")
    for name, value, allowed, why in (
        ("quantize", quantize, (None,), "weights stay as they are stored"),
        ("tensor_parallel", tensor_parallel, (1,), "accelerate spreads layers over all GPUs"),
        ("pipeline_parallel", pipeline_parallel, (1,), "accelerate spreads layers over all GPUs"),
        ("max_batch", max_batch, (None, 1), "one prompt runs at a time"),
        ("memory_share", memory_share, (None,), "accelerate places layers where they fit"),
        ("verify", verify, (False,), "there are no hashes to compare with"),
    ):
        if not any(value is one or (type(value), value) == (type(one), one) for one in allowed):
            raise OptionError(
                f"{name} is {value!r:.80}; allowed beside fallback={NAME!r}: "
                f"{' or '.join(map(str, allowed))}, as {why}"
            )


def is_declared(folder: Path) -> bool:
    """Whether this package's own engine runs what `folder` holds: a family declares it, with its
    settings. Raises CheckpointError where there is no config."""
    if is_artifact(folder) or fastertransformer.find(folder) == folder:
        return True
    config = Config.read(folder)
    try:
        family_of(config.architecture).spec(config)
    except UnsupportedModelError:
        return False
    return True


@dataclass(frozen=True)
class Foreign:
    """A checkpoint that transformers can run. `kind` and `config` are its classes there.

    `positions`: the longest context in tokens; 0: no limit is known.
    """

    folder: Path
    spec: Traits
    architecture: str
    kind: Any
    config: Any
    positions: int

    @classmethod
    def read(cls, folder: Path) -> Foreign:
        """What the config of `folder` says. No weights are read, and no code in it is run.

        Raises UnsupportedModelError unless it is a causal or sequence-to-sequence architecture of
        transformers itself, with weights that are not quantized; CheckpointError for a config that
        does not fit it.
        """
        own = Config.read(folder)
        architecture = own.architecture
        kind = _class(architecture)
        if own.fields.get("quantization_config"):
            raise UnsupportedModelError(
                "config.json: quantization_config is set; the fallback runs unquantized "
                "checkpoints only"
            )
        expected = kind.config_class.model_type
        if own.fields.get("model_type") != expected:
            raise CheckpointError(
                f"config.json: model_type is {own.fields.get('model_type')!r:.80}, but "
                f"{architecture} belongs to {expected!r}"
            )
        try:
            config = kind.config_class.from_pretrained(str(folder), local_files_only=True)
            text = config.get_text_config(decoder=True)
            spec = Traits(
                family=expected,
                kind=_kind(architecture, config),
                vocab=int(text.vocab_size),
                hidden=int(text.hidden_size),
            )
        except UnsupportedModelError:
            raise
        except Exception as error:  # transformers raises whatever the fields lead to
            raise CheckpointError(
                f"{folder / 'config.json'} does not make a {architecture}: {first_line(error)}"
            ) from None
        found = (getattr(text, name, None) for name in _POSITIONS)
        positions = next((n for n in found if isinstance(n, int) and n > 0), 0)
        return cls(folder, spec, architecture, kind, config, positions)


def first_line(error: Exception) -> str:
    """An error of transformers in a line of ours."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _class(architecture: str) -> Any:
    """The class of transformers with this name, if it generates text."""
    import transformers

    causal, seq2seq = _architectures()
    if architecture not in causal | seq2seq:
        raise UnsupportedModelError(
            f"architecture {architecture!r} is declared by no family, and is no causal or "
            f"sequence-to-sequence one of transformers {transformers.__version__}"
        )
    return getattr(transformers, architecture)


def _kind(architecture: str, config: Any) -> Kind:
    if architecture in _architectures()[0]:
        return "decoder"
    if not config.is_encoder_decoder:  # of those that read sound
        raise UnsupportedModelError(f"architecture {architecture!r} does not read text alone")
    return "encoder-decoder"


def _architectures() -> tuple[set[str], set[str]]:
    """The causal, and the sequence-to-sequence ones of transformers."""
    from transformers.models.auto import modeling_auto as auto

    return (
        set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()),
        set(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()),
    )
