"""Every family converts, at every degree, with nothing lost and nothing out of place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.convert import convert
from lmi_multi.checkpoint.inspect import describe
from lmi_multi.checkpoint.shard import local_slice
from tests.families import FAMILIES


@pytest.fixture(scope="session", params=FAMILIES)
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, PreTrainedModel]:
    """A family's name, checkpoint folder and model."""
    folder = tmp_path_factory.mktemp("families") / request.param
    return request.param, folder, FAMILIES[request.param].save(folder)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def sharded(whole: Artifact, rank: int, degree: int) -> dict[str, torch.Tensor]:
    tensors = whole.load_rank(0, 1)
    return {
        stored.name: local_slice(tensors[stored.name], stored.split, degree, rank)
        for stored in whole.stored
    }


def pad_rows(whole: Artifact) -> None:
    """The embedding has no padding rows at degree 1."""
    assert whole.load_rank(0, 1)["embed.weight"].shape[0] == whole.spec.vocab


@pytest.mark.parametrize("quantize", [None, "int8", "fp8"])
def test_any_degree_from_any_other(
    saved: tuple[str, Path, PreTrainedModel], tmp_path: Path, quantize: str | None
) -> None:
    name, folder, _ = saved
    degrees = FAMILIES[name].degrees
    artifacts = {
        degree: convert(folder, tmp_path / str(degree), quantize=quantize, tensor_parallel=degree)
        for degree in degrees
    }
    for stored, artifact in artifacts.items():
        for degree in degrees:
            for rank in range(degree):
                local = artifact.load_rank(rank, degree)
                same(local, sharded(artifacts[1], rank, degree))
                size = sum(tensor.nbytes for tensor in local.values())
                assert artifact.tensor_bytes(rank, degree) == size
        assert artifact.tensor_parallel == stored
    pad_rows(artifacts[1])


def test_no_parameter_is_lost(saved: tuple[str, Path, PreTrainedModel], tmp_path: Path) -> None:
    name, folder, model = saved
    artifact = convert(folder, tmp_path / "artifact")
    expected = sum(parameter.numel() for parameter in model.parameters())
    if name.startswith("opt"):  # positions are numbered from 2
        expected -= 2 * model.config.hidden_size
    tensors = artifact.load_rank(0, 1)
    assert artifact.manifest.parameters == expected == sum(t.numel() for t in tensors.values())
    total = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
    if not name.startswith("opt"):
        held = sum(float(tensor.double().abs().sum()) for tensor in tensors.values())
        assert held == pytest.approx(total, rel=1e-9)


def test_describe_agrees(saved: tuple[str, Path, PreTrainedModel], tmp_path: Path) -> None:
    name, folder, model = saved
    before = describe(folder)
    convert(folder, tmp_path / "artifact")
    after = describe(tmp_path / "artifact", verify=True)
    assert before.kind == "checkpoint" and after.kind == "artifact"
    assert before.verified == "no hashes" and after.verified == "yes"
    assert before.architecture == after.architecture == type(model).__name__
    for field in ("family", "sizes", "parameters", "tied_head", "dtype", "bytes_per_rank"):
        assert getattr(before, field) == getattr(after, field), field
    assert set(FAMILIES[name].degrees) <= set(after.degrees)
    assert after.to_json()["source"] == str(folder)


def load(name: str, tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model = FAMILIES[name].save(tmp_path / "checkpoint")
    artifact = convert(tmp_path / "checkpoint", tmp_path / "artifact")
    return model.state_dict(), artifact.load_rank(0, 1)


def test_gpt2_is_transposed(tmp_path: Path) -> None:
    state, tensors = load("gpt2", tmp_path)
    assert torch.equal(
        tensors["decoder.1.qkv.weight"], state["transformer.h.1.attn.c_attn.weight"].t()
    )
    assert torch.equal(tensors["decoder.1.qkv.bias"], state["transformer.h.1.attn.c_attn.bias"])
    assert "head.weight" not in tensors


def test_neox_heads_are_sorted_into_q_k_v(tmp_path: Path) -> None:
    state, tensors = load("gptneox", tmp_path)
    fused = state["gpt_neox.layers.0.attention.query_key_value.weight"].view(4, 3, 16, 64)
    expected = torch.cat([fused[:, part].reshape(64, 64) for part in range(3)])
    assert torch.equal(tensors["decoder.0.qkv.weight"], expected)


def test_opt_positions_start_at_zero(tmp_path: Path) -> None:
    state, tensors = load("opt", tmp_path)
    expected = state["model.decoder.embed_positions.weight"][2:]
    assert torch.equal(tensors["positions.weight"], expected)


def test_t5_shares_and_separates_its_head(tmp_path: Path) -> None:
    _, tied = load("t5", tmp_path / "tied")
    _, untied = load("t5-gated-untied", tmp_path / "untied")
    assert "head.weight" not in tied and "head.weight" in untied
    assert untied["decoder.0.up.weight"].shape == (128, 40)
    assert "encoder.1.relative.weight" not in tied and "encoder.0.relative.weight" in tied
