"""FasterTransformer's parameters, and what each is in `GenerateOptions`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from lmi_multi.errors import OptionError
from lmi_multi.fastertransformer.words import word_lists
from lmi_multi.options import GenerateOptions
from lmi_multi.tokenizer import Tokenizer

T5_DEFAULTS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "inputs_embeds": None,
        "beam_width": 1,
        "max_seq_len": 200,
        "top_k": 1,
        "top_p": 0.0,
        "beam_search_diversity_rate": 0.0,
        "temperature": 1.0,
        "len_penalty": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": None,
        "min_length": 0,
        "random_seed": 0,
        "is_return_output_log_probs": False,
        "is_return_cum_log_probs": False,
        "is_return_cross_attentions": False,
        "bad_words_list": None,
        "stop_words_list": None,
    }
)
"""What T5's `pipeline_generate` takes beside the inputs."""

GPT_DEFAULTS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "top_k": 1,
        "top_p": 0.0,
        "beam_search_diversity_rate": 0.0,
        "temperature": 1.0,
        "len_penalty": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": None,
        "min_length": 0,
        "random_seed": 0,
        "return_output_length": 0,
        "return_cum_log_probs": 0,
        "bad_words_list": None,
        "stop_words_list": None,
    }
)
"""What GPT's `pipeline_generate` takes as further keywords."""


@dataclass(frozen=True)
class _Same:
    """A parameter that is one option; with one beam, `of_beams` means nothing whatever it is."""

    option: str
    of_beams: bool = False


# In FasterTransformer None stands for a parameter's default.
_SAME: Final[Mapping[str, _Same]] = {
    "max_seq_len": _Same("max_new_tokens"),
    "output_len": _Same("max_new_tokens"),
    "min_length": _Same("min_new_tokens"),
    "random_seed": _Same("seed"),
    "repetition_penalty": _Same("repetition_penalty"),
    "presence_penalty": _Same("presence_penalty"),
    "beam_width": _Same("num_beams"),
    "len_penalty": _Same("length_penalty", of_beams=True),
}
# Parameters that are one for all prompts.
_SINGLE: Final = (
    "beam_width",
    "inputs_embeds",
    "is_return_output_log_probs",
    "is_return_cum_log_probs",
    "is_return_cross_attentions",
    "return_output_length",
    "return_cum_log_probs",
)
_WORDS: Final = ("bad_words_list", "stop_words_list")


def complete(
    function: str, defaults: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """`given` over `defaults`. Raises TypeError for a name that is not among these."""
    for name in given:
        if name not in defaults:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return {**defaults, **given}


def flag(name: str, value: Any) -> bool:
    """A switch: a bool, or 0 or 1."""
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise OptionError(f"{name} is {value!r:.80}, must be True or False")


def options(
    parameters: Mapping[str, Any],
    count: int,
    tokenizer: Tokenizer | None,
    answers: int = 1,
    logprobs: bool = False,
) -> list[dict[str, Any]]:
    """The options of each of `count` prompts, which gets so many `answers`.

    Raises OptionError, which names the parameter, for one that is invalid.
    """
    _refuse(parameters)
    beams = parameters["beam_width"] or 1  # the model's own file does not count here
    spread = {
        name: _spread(name, value, count)
        for name, value in parameters.items()
        if name not in (*_SINGLE, *_WORDS) and name != "beam_search_diversity_rate"
    }
    words = {name: word_lists(name, parameters[name], count, tokenizer) for name in _WORDS}
    results = []
    for index in range(count):
        own = {name: values[index] for name, values in spread.items()} | {"beam_width": beams}
        result = _plain(own) | _sampling(own)
        for name in _WORDS:
            for option, value in words[name][index].items():
                _put(result, name, option, value)
        if logprobs:
            _put(result, "log probabilities", "logprobs", 0)
        if answers > 1:
            _put(result, "beam_width", "num_return_sequences", answers)
        if beams > 1:
            _put(result, "beam_width", "early_stopping", True)
        results.append(result)
    return results


def _refuse(parameters: Mapping[str, Any]) -> None:
    """What nothing here can do."""
    if parameters.get("inputs_embeds") is not None:
        raise OptionError("inputs_embeds is set, but only text and token ids are read")
    if flag("is_return_cross_attentions", parameters.get("is_return_cross_attentions", False)):
        raise OptionError("is_return_cross_attentions is set, but attention is never stored")
    beams = parameters["beam_width"]
    if beams is not None and (isinstance(beams, bool) or not isinstance(beams, int) or beams < 1):
        raise OptionError(f"beam_width is {beams!r:.80}, must be an integer, at least 1")
    rates = _spread("beam_search_diversity_rate", parameters["beam_search_diversity_rate"], None)
    if beams not in (None, 1) and any(rate not in (None, 0) for rate in rates):
        raise OptionError(
            "beam_search_diversity_rate is set, but candidates of one beam are never told apart "
            "by their rank; allowed: 0"
        )


def _plain(own: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that are one option each."""
    result: dict[str, Any] = {}
    for name, same in _SAME.items():
        value = own.get(name)
        if value is not None and not (same.of_beams and own["beam_width"] == 1):
            _put(result, name, same.option, value)
    return result


def _sampling(own: Mapping[str, Any]) -> dict[str, Any]:
    """Greedy or not: top_k 1 is, and so are beams, and top_k and top_p both 0.

    top_k alone (top_p 0) draws from the k likeliest tokens, top_p alone (top_k 0) from the
    smallest set of the likeliest that reaches it.
    """
    top_k, top_p, temperature = (own[name] for name in ("top_k", "top_p", "temperature"))
    result: dict[str, Any] = {}
    _put(result, "top_k", "top_k", top_k if top_k is not None else 0)
    _put(result, "top_p", "top_p", top_p or 1.0)  # a False would pass for a 0
    _put(result, "temperature", "temperature", temperature if temperature is not None else 1.0)
    if isinstance(top_p, bool):
        raise OptionError(f"top_p is {top_p}, must be a number from 0 to 1")
    if own["beam_width"] > 1 or top_k == 1 or not (top_k or top_p):
        return {"do_sample": False}
    return {"do_sample": True, **result}


def _put(result: dict[str, Any], name: str, option: str, value: Any) -> None:
    """Set an option after a look at its value, so that an error tells the parameter's name."""
    try:
        GenerateOptions(**{option: value})
    except OptionError:
        allowed = GenerateOptions.model_fields[option].description
        raise OptionError(f"{name} is {value!r:.80}; allowed: {allowed}") from None
    result[option] = value


def _spread(name: str, value: Any, count: int | None) -> list[Any]:
    """One value for each prompt, from one for all or one for each; `count` None: any number."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return [value] * (1 if count is None else count)
    # Triton's form is [batch, 1].
    values = [v[0] if isinstance(v, list | tuple) and len(v) == 1 else v for v in value]
    if count is None or len(values) == count:
        return values
    if len(values) != 1:
        raise OptionError(
            f"{name} has {len(values)} values for {count} prompts; allowed: one for all, or one "
            "for each prompt"
        )
    return values * count
