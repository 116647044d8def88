"""Rotary positions against transformers, over random settings, and beyond the trained context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.convert import convert
from lmi_multi.errors import OptionError
from lmi_multi.model import Model, load
from lmi_multi.models.config import Config
from lmi_multi.models.rope import cos_sin, inverse_frequencies, rotate
from lmi_multi.models.spec import Rope
from tests.families import VOCAB, Tiny, _llama
from tests.tiny_models import model


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, width=32)


FACTOR = floats(1, 64)
ORIGINAL = st.integers(8, 32768)
SETTINGS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "default": {},
    "linear": {"factor": FACTOR},
    "dynamic": {"factor": FACTOR},
    "llama3": {
        "factor": FACTOR,
        "low_freq_factor": floats(0.5, 2),
        "high_freq_factor": floats(3, 8),
        "original_max_position_embeddings": ORIGINAL,
    },
    "yarn": {
        "factor": FACTOR,
        "original_max_position_embeddings": ORIGINAL,
        "beta_fast": floats(8, 64),
        "beta_slow": floats(0.5, 4),
        "truncate": st.booleans(),
        "attention_factor": st.none() | floats(0.5, 2),
        "mscale": st.none() | floats(0.25, 2),
        "mscale_all_dim": st.none() | floats(0.25, 2),
    },
}


def ours(config: LlamaConfig) -> Rope:
    fields = {"rope_parameters": config.rope_parameters}
    fields["max_position_embeddings"] = config.max_position_embeddings
    return Config(fields).rope(config.head_dim)


@pytest.mark.parametrize("kind", SETTINGS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_frequencies_and_attention_factor(kind: str, data: st.DataObject) -> None:
    parameters = {name: data.draw(values, label=name) for name, values in SETTINGS[kind].items()}
    parameters |= {"rope_type": kind, "rope_theta": data.draw(floats(100, 1e6), label="theta")}
    config = LlamaConfig(
        head_dim=2 * data.draw(st.integers(2, 64), label="pairs"),
        max_position_embeddings=data.draw(ORIGINAL, label="longest"),
        rope_parameters=parameters,
    )
    length = data.draw(st.integers(1, 100_000), label="length")
    if kind == "default":
        theirs, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        theirs, factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=torch.tensor(length))
    rope = ours(config)
    lengths = torch.tensor([length])
    mine = inverse_frequencies(rope, lengths).reshape(-1)
    torch.testing.assert_close(mine, theirs.float(), rtol=2e-5, atol=0)
    cos, sin = cos_sin(rope, torch.tensor([0]), lengths)
    torch.testing.assert_close(cos, torch.full_like(cos, factor), rtol=1e-6, atol=0)
    assert not sin.any()


@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        ({}, 100),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 250),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, 400),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 1}}, 100),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "original_max_position_embeddings": 50,
                }
            },
            100,
        ),
        (  # either the stretched context or the trained one stands in the file
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4,
                    "original_max_position_embeddings": 25,
                }
            },
            100,
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, 400),
    ],
)
def test_context(fields: dict[str, Any], longest: int) -> None:
    config = Config({"max_position_embeddings": 100, **fields})
    assert config.context(config.rope(16)) == longest


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 3, 20, generator=generator)
    rope = Rope(dim=16)

    def at(x: torch.Tensor, position: int) -> torch.Tensor:
        place = torch.tensor([position])
        return rotate(x, *cos_sin(rope, place, place))

    torch.testing.assert_close(at(q, 77).norm(dim=-1), q.norm(dim=-1))
    assert torch.equal(at(q, 9)[..., 16:], q[..., 16:])
    near, far = ((at(q, a) * at(k, b)).sum(-1) for a, b in ((9, 4), (105, 100)))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(near, (at(q, 9) * at(k, 5)).sum(-1))


# --- dynamic scaling, end to end

TRAINED = 32
DYNAMIC = Tiny(
    "LlamaForCausalLM",
    "LlamaConfig",
    _llama(
        head_dim=16,
        max_position_embeddings=TRAINED,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    ),
)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dynamic") / "checkpoint"
    DYNAMIC.save(folder)
    return folder


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    # Beyond the trained context from the start, on the way, never, and by its last token.
    return [
        torch.randint(3, VOCAB, (n,), generator=generator).tolist()
        for n in (50, TRAINED - 6, 5, TRAINED)
    ]


def theirs(prompt: list[int], new: int) -> list[int]:
    """From a fresh model: transformers' keeps the longest context that it has seen."""
    ids = torch.tensor([prompt])
    out = DYNAMIC.build().generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def tokens(opened: Model, given: list[list[int]]) -> list[list[int]]:
    return [c.token_ids for c in opened.generate(given, max_new_tokens=20, min_new_tokens=20)]


def test_generation_beyond_the_trained_context(dynamic: Path) -> None:
    expected = [theirs(prompt, 20) for prompt in prompts()]
    with load(dynamic, backend="cpu", max_tokens=4 * TRAINED) as opened:
        assert [tokens(opened, [prompt])[0] for prompt in prompts()] == expected
        assert tokens(opened, prompts()) == expected  # each row has a length of its own
    with pytest.raises(
        OptionError, match="max_tokens is 129, but the model's positions end at 128"
    ):
        load(dynamic, backend="cpu", max_tokens=129)
    artifact: Artifact = convert(dynamic, dynamic.parent / "artifact")
    with model(artifact, max_tokens=128, max_step_tokens=7) as sliced:
        assert tokens(sliced, prompts()) == expected
