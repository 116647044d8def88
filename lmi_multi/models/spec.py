"""What a network is: sizes and architectural choices, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from lmi_multi.errors import CheckpointError

Kind = Literal["decoder", "encoder", "encoder-decoder"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
RopeKind = Literal["linear", "dynamic", "yarn", "llama3"]


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Absolute position embeddings, one row per position."""

    type: Literal["learned"] = "learned"


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    The formulas are those of the `rope_type` of the same name in Hugging Face transformers.
    `original_max` is the trained context in tokens.
    """

    type: RopeKind
    factor: float
    original_max: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions on the first `dim` features of each head, half-split layout.

    Su et al., "RoFormer", 2021; half-split as in GPT-NeoX (feature i rotates with i + dim / 2).
    """

    dim: int
    theta: float = 10_000.0
    scaling: RopeScaling | None = None
    type: Literal["rope"] = "rope"


@dataclass(frozen=True, kw_only=True)
class Alibi:
    """A linear distance penalty on the attention scores (Press et al., 2021)."""

    type: Literal["alibi"] = "alibi"


@dataclass(frozen=True, kw_only=True)
class RelativeBias:
    """T5's bucketed distances: one learned bias per bucket and head (Raffel et al., 2019).

    `per_layer`: every layer has its own table (UMT5) instead of sharing the first one's.
    """

    buckets: int
    max_distance: int
    per_layer: bool = False
    type: Literal["relative"] = "relative"


Position = Learned | Rope | Alibi | RelativeBias


# The least value of every size; 0 stands for a default, or for none.
_LEAST = dict.fromkeys(("vocab", "hidden", "heads", "ffn"), 1) | dict.fromkeys(
    ("encoder_layers", "decoder_layers", "kv_heads", "head_dim", "embed_dim", "segments"), 0
)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One network. Whether a bias, a head or a final norm exists is decided by the tensors.

    Sizes are in elements; `max_positions` is the longest context in tokens that the position
    scheme allows (0: no limit); `windows` holds one sliding-window length a decoder layer
    (0: full attention; an empty tuple: every layer is full).
    """

    family: str
    vocab: int
    hidden: int
    heads: int
    ffn: int
    position: Position
    encoder_layers: int = 0
    decoder_layers: int = 0
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: hidden // heads
    embed_dim: int = 0  # 0: hidden; OPT-350m embeds narrower and projects
    segments: int = 0  # BERT's token types
    max_positions: int = 0
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    block: Literal["pre", "post", "parallel"] = "pre"
    activation: Activation = "gelu"
    gated: bool = False
    attention_scale: float = 0.0  # 0: head_dim ** -0.5
    inverse_layer_scale: bool = False  # GPT-2: scores of layer i are divided by i + 1
    logit_scale: float = 1.0
    windows: tuple[int, ...] = ()
    wide_residual: bool = False  # activations leave fp16's range: there, residual and down are fp32

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise CheckpointError(f"{name} is {getattr(self, name)}, must be at least {least}")
        for name in ("norm_eps", "attention_scale", "logit_scale"):
            if not 0 <= getattr(self, name) < float("inf"):  # NaN is neither
                raise CheckpointError(
                    f"{name} is {getattr(self, name)}, must be a finite number, at least 0"
                )
        fill = {
            "kv_heads": self.kv_heads or self.heads,
            "head_dim": self.head_dim or self.hidden // self.heads,
            "embed_dim": self.embed_dim or self.hidden,
        }
        for name, value in fill.items():
            object.__setattr__(self, name, value)
        if not self.head_dim:
            raise CheckpointError(f"{self.hidden} features do not make {self.heads} heads")
        if not self.attention_scale:
            object.__setattr__(self, "attention_scale", self.head_dim**-0.5)
        if self.encoder_layers + self.decoder_layers < 1:
            raise CheckpointError("the model has no layers")
        if self.heads % self.kv_heads:
            raise CheckpointError(
                f"heads is {self.heads}, must be a multiple of kv_heads, which is {self.kv_heads}"
            )
        if self.windows and len(self.windows) != self.decoder_layers:
            raise CheckpointError(
                f"windows has {len(self.windows)} entries for {self.decoder_layers} decoder layers"
            )
        self._check_position()

    def _check_position(self) -> None:
        position = self.position
        if isinstance(position, Rope):
            least = 4 if position.scaling and position.scaling.type == "dynamic" else 2
            if position.dim % 2 or not least <= position.dim <= self.head_dim:
                raise CheckpointError(
                    f"rotary dim is {position.dim}, must be even, at least {least}, and at most "
                    f"the {self.head_dim} of a head"
                )
            if position.theta <= 1:
                raise CheckpointError(f"rope theta is {position.theta}, must be above 1")
        elif isinstance(position, RelativeBias) and (
            position.buckets < 4 or position.max_distance <= position.buckets // 2
        ):
            raise CheckpointError(
                f"relative bias has {position.buckets} buckets up to distance "
                f"{position.max_distance}, must have at least 4, and reach beyond half their number"
            )

    @property
    def kind(self) -> Kind:
        """Which stacks the network has."""
        if self.encoder_layers and self.decoder_layers:
            return "encoder-decoder"
        return "decoder" if self.decoder_layers else "encoder"

    @property
    def length_dependent(self) -> bool:
        """Whether a token's keys depend on the length of its text: with dynamic rope scaling."""
        scaling = self.position.scaling if isinstance(self.position, Rope) else None
        return scaling is not None and scaling.type == "dynamic"

    def scale(self, layer: int) -> float:
        """The factor on the attention scores of decoder layer `layer`."""
        return self.attention_scale / (layer + 1 if self.inverse_layer_scale else 1)

    def window(self, layer: int) -> int:
        """The sliding window of decoder layer `layer` in tokens; 0: none."""
        return self.windows[layer] if self.windows else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as the manifest stores it."""
        data: dict[str, Any] = _ADAPTER.dump_python(self, mode="json")
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelSpec:
        """The inverse of `to_dict`. Raises CheckpointError on unknown or malformed fields."""
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise CheckpointError(f"spec has unknown fields: {', '.join(sorted(unknown))}")
        try:
            return _ADAPTER.validate_python(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise CheckpointError(f"spec field {where}: {first['msg']}") from None


_ADAPTER = TypeAdapter(ModelSpec)
