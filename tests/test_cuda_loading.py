"""Weights straight from their file to the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lmi_multi import backends
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.convert import convert
from lmi_multi.checkpoint.header import build_header, read_header
from lmi_multi.errors import CheckpointError
from tests import tiny_models

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module", autouse=True)
def _available() -> None:
    state = backends.probe("cuda")
    if not state.ok:
        pytest.skip(f"cuda: {state.reason}")


def test_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    """Tensors of no, one and some chunks' bytes, of odd sizes and every stored type."""
    from lmi_multi.backends.cuda.loading import CHUNK, read_file

    torch.manual_seed(0)
    made = {
        "long": torch.randint(-128, 128, (2 * CHUNK + 77,), dtype=torch.int8),
        "codes": torch.randn(77, 5).to(torch.float8_e4m3fn),
        "exact": torch.randn(CHUNK // 8, 2),
        "half": torch.randn(33, 7).to(torch.bfloat16),
        "odd": torch.randn(5).half(),
        "none": torch.empty(0, 4),
    }
    path = tmp_path / "model.safetensors"
    save_file(made, path)
    found = read_file(path, read_header(path), torch.device("cuda", 0))
    assert set(found) == set(made)
    for name, tensor in made.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].cpu(), tensor)


def test_a_tensor_may_have_more_bytes_than_31_bits_count(tmp_path: Path) -> None:
    from lmi_multi.backends.cuda.loading import read_file

    size = 2**31 + 3 * 2**20 + 5
    if torch.cuda.mem_get_info()[0] < size + 2**30:
        pytest.skip("cuda: too little memory is free")
    head, infos = build_header([("long", (size,), torch.uint8)])
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:  # a hole, but for its ends
        file.write(head + b"begin")
        file.seek(infos["long"].stop - 3)
        file.write(b"end")
    found = read_file(path, read_header(path), torch.device("cuda", 0))["long"]
    assert bytes(found[:6].tolist()) == b"begin\0" and bytes(found[-4:].tolist()) == b"\0end"
    assert int(found.count_nonzero()) == len(b"beginend")


@pytest.mark.parametrize("quantize", [None, "int8", "fp8"])
def test_ranks_are_those_of_the_artifact(tmp_path: Path, quantize: str | None) -> None:
    from lmi_multi.backends.cuda.loading import load_rank

    source = tiny_models.checkpoint(tmp_path, "llama")
    artifact = convert(source, tmp_path / "a", dtype="bf16", quantize=quantize, tensor_parallel=2)
    for rank, size in ((0, 2), (1, 2), (0, 1), (1, 4), (3, 4)):
        expected = artifact.load_rank(rank, size)
        found = load_rank(artifact, rank, size, torch.device("cuda", 0))
        assert set(found) == set(expected)
        assert all(torch.equal(found[name].cpu(), expected[name]) for name in expected)


def test_a_file_cut_short_is_an_error(tmp_path: Path) -> None:
    from lmi_multi.backends.cuda import loading

    source = tiny_models.checkpoint(tmp_path, "llama")
    artifact = Artifact.open(convert(source, tmp_path / "a", dtype="bf16").folder)
    path = artifact.rank_path(0)
    infos = read_header(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="became shorter"):
        loading.read_file(path, infos, torch.device("cuda", 0))
