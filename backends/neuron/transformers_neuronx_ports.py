"""Which networks transformers-neuronx can run, and how they are told to it.

That library has its own class for each family, with settings of its own. A `Port` describes a
network in the family's config.json as far as the library heeds it; read back it must be the same
network, and what differs is what the library cannot run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.files import listed
from lmi_multi.errors import BackendError
from lmi_multi.models.config import Config
from lmi_multi.models.family import Family
from lmi_multi.models.registry import FAMILIES
from lmi_multi.models.spec import ModelSpec, Rope

LIBRARY = "transformers-neuronx"
# What is not here the library does not have, or has for another family only.
_ACTIVATIONS = {"gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}
# Modules that have a bias, and modules that the library's networks lack.
_NORMS = frozenset(("embed_norm", "norm", "norm1", "norm2"))
_LAYER = frozenset(("qkv", "out", "up", "down"))
_ABSENT = frozenset(("q_norm", "k_norm", "project_in", "project_out"))


@dataclass(frozen=True)
class Port:
    """A family as the library runs it: the name of its class, the architecture and settings of
    config.json, the canonical modules that have a bias there, whether it has graphs for prompts
    (others read them token by token), and whether rows may come and go (continuous batching).
    Those with graphs for prompts also save compiled graphs, and compile without cores."""

    name: str
    architecture: str
    config: Callable[[ModelSpec], dict[str, Any]]
    biased: frozenset[str] = frozenset()
    reads_prompts: bool = True
    continuous: bool = False


def _gpt2(s: ModelSpec) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": s.vocab,
        "n_embd": s.hidden,
        "n_layer": s.decoder_layers,
        "n_head": s.heads,
        "n_positions": s.max_positions,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
    }


def _opt(s: ModelSpec) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "word_embed_proj_dim": s.hidden,
        "num_hidden_layers": s.decoder_layers,
        "num_attention_heads": s.heads,
        "ffn_dim": s.ffn,
        "max_position_embeddings": s.max_positions,
        "activation_function": _ACTIVATIONS.get(s.activation, "relu"),
        "do_layer_norm_before": True,
    }


def _bloom(s: ModelSpec) -> dict[str, Any]:
    return {
        "model_type": "bloom",
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "n_layer": s.decoder_layers,
        "n_head": s.heads,
        "layer_norm_epsilon": 1e-5,
    }


def _gptj(s: ModelSpec) -> dict[str, Any]:
    return {
        "model_type": "gptj",
        "vocab_size": s.vocab,
        "n_embd": s.hidden,
        "n_layer": s.decoder_layers,
        "n_head": s.heads,
        "n_positions": s.max_positions,
        "rotary_dim": rope(s).dim,
        "activation_function": _ACTIVATIONS.get(s.activation, "gelu_new"),
        "layer_norm_epsilon": 1e-5,
    }


def _gptneox(s: ModelSpec) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox",
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "num_hidden_layers": s.decoder_layers,
        "num_attention_heads": s.heads,
        "intermediate_size": s.ffn,
        "max_position_embeddings": s.max_positions,
        "rotary_pct": rope(s).dim / s.head_dim,
        "rotary_emb_base": rope(s).theta,
        "use_parallel_residual": True,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
    }


def _llama(s: ModelSpec) -> dict[str, Any]:
    scaling = rope(s).scaling
    told = (
        {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max,
        }
        if scaling is not None and scaling.type == "llama3"
        else None
    )
    return {
        "model_type": "llama",
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "num_hidden_layers": s.decoder_layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "intermediate_size": s.ffn,
        "max_position_embeddings": s.max_positions,
        "rms_norm_eps": s.norm_eps,
        "rope_theta": rope(s).theta,
        "rope_scaling": told,
        "hidden_act": "silu",
    }


def _mistral(s: ModelSpec) -> dict[str, Any]:
    changed = {"model_type": "mistral", "rope_scaling": None, "sliding_window": s.windows[0]}
    return _llama(s) | changed


def rope(s: ModelSpec) -> Rope:
    """The rotary positions of a family that has them."""
    if not isinstance(s.position, Rope):
        raise TypeError(f"{s.family} has rotary positions")
    return s.position


PORTS: dict[str, Port] = {
    "gpt2": Port(
        "GPT2ForSamplingWithContextBroadcasting", "GPT2LMHeadModel", _gpt2, _NORMS | _LAYER
    ),
    "opt": Port("OPTForSampling", "OPTForCausalLM", _opt, _NORMS | _LAYER),
    "bloom": Port("BloomForSampling", "BloomForCausalLM", _bloom, _NORMS | _LAYER),
    "gptj": Port(
        "GPTJForSampling", "GPTJForCausalLM", _gptj, _NORMS | {"up", "down", "head"}, False
    ),
    "gptneox": Port("GPTNeoXForSampling", "GPTNeoXForCausalLM", _gptneox, _NORMS | _LAYER, False),
    "llama": Port("LlamaForSampling", "LlamaForCausalLM", _llama, continuous=True),
    "mistral": Port("MistralForSampling", "MistralForCausalLM", _mistral, continuous=True),
}


def find_port(artifact: Artifact) -> Port:
    """How the library runs the artifact. Raises BackendError that names what it cannot run."""
    spec = artifact.spec
    port = PORTS.get("mistral" if spec.family == "llama" and any(spec.windows) else spec.family)
    if port is None:
        known = ", ".join(PORTS)
        raise BackendError(f"{LIBRARY} does not run the family {spec.family}; it runs {known}")
    faults = [*_differences(spec, port), *_tensors(artifact, port)]
    if artifact.quantize:
        faults.append(f"quantize is {artifact.quantize!r}, it runs None")
    if faults:
        raise BackendError(f"{LIBRARY} cannot run this model: {'; '.join(faults)}")
    return port


def _differences(spec: ModelSpec, port: Port) -> Iterator[str]:
    config = Config({"architectures": [port.architecture], **port.config(spec)})
    same = family_of(spec).spec(config)
    for field in fields(ModelSpec):
        ours, theirs = getattr(spec, field.name), getattr(same, field.name)
        if ours != theirs:
            yield f"{field.name} is {ours!r}, it runs {theirs!r}"


def _tensors(artifact: Artifact, port: Port) -> Iterator[str]:
    """The library has the same tensors in every checkpoint of a family; a head may be tied."""
    table = family_of(artifact.spec).weights(artifact.spec)
    modules = [module for module in table if _last(module) not in _ABSENT]
    expected = {f"{m}.weight" for m in modules if m != "head"}
    expected |= {f"{m}.bias" for m in modules if _last(m) in port.biased}
    names = {t.name for t in artifact.stored if not t.name.endswith(".scale")} - {"head.weight"}
    for wrong, fault in ((names - expected, "does not have"), (expected - names, "needs")):
        if wrong:
            yield f"it {fault} {listed(sorted(wrong))}"


def _last(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def family_of(spec: ModelSpec) -> Family:
    """The family that the spec names."""
    return next(family for family in FAMILIES if family.name == spec.family)
