"""A checkpoint's config.json, read without any model class of transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

from lmi_multi.errors import CheckpointError, UnsupportedModelError
from lmi_multi.models.spec import Activation, Rope, RopeKind, RopeScaling

_T = TypeVar("_T", int, float, str, bool)

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class Config:
    """Typed access to config.json: a missing or ill-typed field is an error that names it."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields

    @classmethod
    def read(cls, folder: Path) -> Config:
        """Read `folder/config.json`. Raises CheckpointError when it is missing or no object."""
        path = folder / "config.json"
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{folder} is no checkpoint: it has no config.json") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
        if not isinstance(fields, dict):
            raise CheckpointError(f"{path} must hold a JSON object, not {type(fields).__name__}")
        return cls(fields)

    @property
    def architecture(self) -> str:
        """The one entry of `architectures`."""
        names = self.fields.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise CheckpointError(
                f"config.json: architectures is {names!r}, must be a list with one class name"
            )
        return names[0]

    def _typed(self, name: str, value: Any, kind: type[_T]) -> _T:
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(f"config.json: {name} is {value!r}, must be {kind.__name__}")
        return value

    def integer(self, name: str, default: int | None = None, *, least: int = 0) -> int:
        """An integer field of at least `least`; null counts as absent."""
        value = self._get(name, default, int)
        if value < least:
            raise CheckpointError(f"config.json: {name} is {value}, must be at least {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number field; null counts as absent."""
        value = self.fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
            return float(value)
        value = self._get(name, default, float)
        if not math.isfinite(value):
            raise CheckpointError(f"config.json: {name} is {value}, must be finite")
        return value

    def first(self, *names: str) -> str:
        """The first of the names under which a field may stand that is there; else the last."""
        return next((name for name in names if self.fields.get(name) is not None), names[-1])

    def text(self, name: str, default: str | None = None) -> str:
        """A string field; null counts as absent."""
        return self._get(name, default, str)

    def flag(self, name: str, default: bool | None = None) -> bool:
        """A boolean field; null counts as absent."""
        return self._get(name, default, bool)

    def _get(self, name: str, default: _T | None, kind: type[_T]) -> _T:
        value = self.fields.get(name)
        if value is None:
            if default is None:
                raise CheckpointError(f"config.json: {name} is missing")
            return default
        return self._typed(name, value, kind)

    def activation(self, name: str, default: str) -> Activation:
        """An activation under its canonical name."""
        value = self.text(name, default)
        if value not in ACTIVATIONS:
            raise UnsupportedModelError(
                f"config.json: {name} is {value!r}; supported: {', '.join(sorted(ACTIVATIONS))}"
            )
        return ACTIVATIONS[value]

    def forbid(self, **allowed: Any) -> None:
        """Refuse settings that would change the network in a way no family declares."""
        for name, value in allowed.items():
            actual = self.fields.get(name)
            if actual is not None and actual != value:
                raise UnsupportedModelError(
                    f"config.json: {name} is {actual!r}; only {value!r} is supported"
                )

    def rope(self, head_dim: int, partial: float = 1.0, theta: float = 10_000.0) -> Rope:
        """Rotary settings in both spellings: `rope_parameters`, or `rope_theta` + `rope_scaling`.

        `partial` and `theta` are the family's defaults.
        """
        fields: dict[str, Any] = {}
        for name in ("rope_scaling", "rope_parameters"):
            given = self.fields.get(name) or {}
            if not isinstance(given, dict):
                raise CheckpointError(f"config.json: {name} is {given!r}, must be an object")
            if nested := [key for key, value in given.items() if isinstance(value, dict)]:
                raise UnsupportedModelError(
                    f"config.json: {name} has settings of its own for {', '.join(nested)}; only "
                    "one for all layers is supported"
                )
            fields |= given
        settings = Config(fields)
        theta = settings.number("rope_theta", self.number("rope_theta", theta))
        partial = settings.number("partial_rotary_factor", partial)
        kind = settings.text("rope_type", settings.text("type", "default"))
        rope_dim = int(head_dim * partial)
        if kind == "default":
            return Rope(dim=rope_dim, theta=theta)
        known = get_args(RopeKind)
        if kind not in known:
            raise UnsupportedModelError(
                f"config.json: rope type is {kind!r}; supported: default, {', '.join(known)}"
            )
        scaling = self._scaling(cast(RopeKind, kind), settings)
        return Rope(dim=rope_dim, theta=theta, scaling=scaling)

    def context(self, rope: Rope) -> int:
        """The longest context in tokens that `rope` was made for.

        `max_position_embeddings` is the trained context for `linear` and `dynamic`, and the
        stretched one for `llama3`; of `yarn` there are checkpoints with either.
        """
        scaling, longest = rope.scaling, self._longest()
        if scaling is None or scaling.type == "llama3":
            return longest
        return max(longest, int(scaling.original_max * scaling.factor))

    def _longest(self) -> int:
        return self.integer("max_position_embeddings", 2048, least=1)

    def _scaling(self, kind: RopeKind, settings: Config) -> RopeScaling:
        # Only the kinds that tell the trained context from the stretched one look at the first.
        name, original = "original_max_position_embeddings", self._longest()
        if kind in ("yarn", "llama3"):
            original = self.integer(name, settings.integer(name, original, least=1), least=1)
        factor = settings.number("factor", self._longest() / original if kind == "yarn" else None)
        if factor < 1:
            raise CheckpointError(f"config.json: rope factor is {factor}, must be at least 1")
        attention = 1.0
        if kind == "yarn":
            attention = settings.number("attention_factor", _yarn_attention(factor, settings))
        return RopeScaling(
            type=kind,
            factor=factor,
            original_max=original,
            low_freq_factor=settings.number("low_freq_factor", 1.0),
            high_freq_factor=settings.number("high_freq_factor", 4.0),
            beta_fast=settings.number("beta_fast", 32.0),
            beta_slow=settings.number("beta_slow", 1.0),
            attention_factor=attention,
            truncate=settings.flag("truncate", True),
        )


def _yarn_attention(factor: float, settings: Config) -> float:
    """YaRN's factor on cos and sin (Peng et al., 2023, section 3.4)."""

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    own, total = settings.number("mscale", 0.0), settings.number("mscale_all_dim", 0.0)
    return mscale(own) / mscale(total) if own and total else mscale(1.0)
