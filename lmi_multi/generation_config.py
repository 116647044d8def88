"""What a model's own files say about generation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmi_multi.errors import CheckpointError, OptionError
from lmi_multi.options import MAX_BEAMS, GenerateOptions
from lmi_multi.values import MAX_BIAS

if TYPE_CHECKING:
    from typing_extensions import Self

# Options that the file may set, by the file's name for them.
_OF_CALLS = {
    *("seed", "ignore_eos", "stop_token_ids", "logprobs", "prompt_logprobs", "return_full_text"),
    *("presence_penalty", "frequency_penalty", "stop", "bad_words", "logit_bias"),
    "num_beams",  # a field of its own, as the file may set sampling options beside it
}
_OPTIONS = {name: name for name in GenerateOptions.model_fields if name not in _OF_CALLS}
_OPTIONS |= {"stop_strings": "stop", "bad_words_ids": "bad_words", "sequence_bias": "logit_bias"}

# Settings of beam search, which many files have without ever using them.
_GROUPS = ("num_beam_groups", "diversity_penalty")
_OF_BEAMS = ("length_penalty", "early_stopping", "num_return_sequences", *_GROUPS)

# Settings that would change the output and that nothing here obeys yet, each with the values
# (beside null) that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "penalty_alpha": (0,),
    "dola_layers": (),
    "constraints": ([],),
    "force_words_ids": ([],),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "forced_decoder_ids": ([],),
    "begin_suppress_tokens": ([],),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "token_healing": (False,),
    "max_time": (),
}


@dataclass(frozen=True)
class GenerationConfig:
    """Token ids and default options of one model.

    `num_beams` are used unless a call samples. `source` is the name of the file that all this
    comes from. `unsupported` names the settings in it that
    would change the output with Hugging Face and do nothing here.
    """

    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    options: GenerateOptions = field(default_factory=GenerateOptions)
    num_beams: int = 1
    unsupported: tuple[str, ...] = ()
    source: str = "generation_config.json"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read `folder/generation_config.json`; without it, config.json, as Hugging Face does.

        Old checkpoints keep generation settings in config.json; where generation_config.json
        exists, nothing of config.json counts. Without either file everything is unset. Raises
        CheckpointError, naming file and field, for a malformed one.
        """
        for name in ("generation_config.json", "config.json"):
            fields = _read(folder / name)
            if fields is not None:
                return cls._parse(fields if name[0] == "g" else _legacy(fields), folder / name)
        return cls()

    @classmethod
    def _parse(cls, fields: Mapping[str, Any], path: Path) -> Self:
        bos = _token(fields, "bos_token_id", path)
        start = _token(fields, "decoder_start_token_id", path)
        return cls(
            eos_token_ids=_tokens(fields, "eos_token_id", path),
            pad_token_id=_token(fields, "pad_token_id", path),
            bos_token_id=bos,
            decoder_start_token_id=bos if start is None else start,
            options=_options(fields, path),
            num_beams=_beams(fields),
            unsupported=_unsupported(fields),
            source=path.name,
        )


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, None when there is no such file."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(fields).__name__}")
    return fields


def _legacy(config: dict[str, Any]) -> dict[str, Any]:
    """config.json's generation settings; a nested decoder's own fill those left unset."""
    fields = {name: value for name, value in config.items() if value is not None}
    for name in ("decoder", "generator", "text_config"):
        if isinstance(nested := fields.get(name), dict):
            return {**nested, **fields}
    return fields


def _token(fields: Mapping[str, Any], name: str, path: Path) -> int | None:
    """One token id; of a list, which a few checkpoints hold, the first."""
    return next(iter(_tokens(fields, name, path)), None)


def _tokens(fields: Mapping[str, Any], name: str, path: Path) -> tuple[int, ...]:
    """Token ids: null, one, or a list. A negative one, as old files have for "none", is none."""
    value = fields.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise CheckpointError(f"{path}: {name} is {value!r}, must be a token id or a list of them")
    return tuple(dict.fromkeys(token for token in ids if token >= 0))


def _options(fields: Mapping[str, Any], path: Path) -> GenerateOptions:
    asked = {ours: fields.get(name) for name, ours in _OPTIONS.items()}
    asked["forced_bos_token_id"] = _token(fields, "forced_bos_token_id", path)
    for name in ("forced_eos_token_id", "suppress_tokens"):
        asked[name] = _tokens(fields, name, path) or None
    asked["logit_bias"] = _single_bias(fields.get("sequence_bias")) or None
    given = {name: value for name, value in asked.items() if value is not None}
    for name in _unusable(fields):
        given.pop(name, None)
    if not given.get("do_sample"):
        # Beside greedy decoding Hugging Face never looks at these, and real files hold 0 there.
        for name in ("temperature", "top_k", "top_p", "typical_p"):
            if given.get(name) == 0:
                del given[name]
        given.pop("do_sample", None)  # the default anyway; sampling settings may stand beside it
    try:
        return GenerateOptions.of(given)
    except OptionError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _unusable(fields: Mapping[str, Any]) -> list[str]:
    """The settings of beam search in the file that cannot be kept: values that a call may not
    have, and groups that do not go with the other settings."""
    beams = _beams(fields)
    found = []
    if fields.get("num_beams") is not None and (
        type(fields["num_beams"]) is not int or fields["num_beams"] != beams
    ):
        found.append("num_beams")
    found += [name for name in _OF_BEAMS if not _is_allowed(name, fields.get(name))]
    groups, penalty = (fields.get(name) or 0 for name in _GROUPS)
    if not set(_GROUPS) & set(found) and beams > 1:
        grouped = groups > 1
        if grouped != bool(penalty) or (grouped and beams % groups):
            found += [name for name in _GROUPS if fields.get(name) is not None]
    return found


def _is_allowed(name: str, value: Any) -> bool:
    try:
        GenerateOptions.of({name: value})
    except OptionError:
        return False
    return True


def _single_bias(value: Any) -> dict[int, float] | None:
    """The file's `sequence_bias`, pairs of a list of ids and a number, as a logit bias; None if
    it is absent or more than one: over several tokens, or larger."""
    try:
        pairs = {token: amount for (token,), amount in value or ()}
        return pairs if all(abs(amount) <= MAX_BIAS for amount in pairs.values()) else None
    except (TypeError, ValueError):
        return None


def _beams(fields: Mapping[str, Any]) -> int:
    """The file's `num_beams`; 1 where it asks for what there is not: beams that sample, or more
    of them than a call may have."""
    beams = fields.get("num_beams")
    usable = type(beams) is int and 1 <= beams <= MAX_BEAMS and not fields.get("do_sample")
    return beams if usable and beams is not None else 1


def _unsupported(fields: Mapping[str, Any]) -> tuple[str, ...]:
    names = [
        name
        for name, neutral in _UNSUPPORTED.items()
        if fields.get(name) is not None and fields[name] not in neutral
    ]
    names += _unusable(fields)
    if fields.get("sequence_bias") and _single_bias(fields["sequence_bias"]) is None:
        names.append("sequence_bias")
    return tuple(f"{name}={fields[name]!r}" for name in names)
