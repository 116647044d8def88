"""Opening artifacts: every way in which a file can be missing, truncated, altered or mismatched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmi_multi.checkpoint.artifact import Artifact, is_artifact
from lmi_multi.checkpoint.convert import convert
from lmi_multi.errors import CheckpointError, OptionError

RANK1 = "rank-1-of-2.safetensors"


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return convert(checkpoint, tmp_path / "artifact", tensor_parallel=2).folder


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "lmi_multi.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of rank 1, and the manifest's size, so that only headers can tell."""
    tensors = load_file(folder / RANK1)
    edit(tensors)
    (folder / RANK1).unlink()
    save_file(tensors, folder / RANK1)
    size = (folder / RANK1).stat().st_size
    edit_manifest(folder, lambda data: data["files"][RANK1].update(size=size))


def refused(folder: Path, message: str, verify: bool = False) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Artifact.open(folder, verify_hashes=verify)
    assert "\n" not in str(caught.value)


def test_truncated(folder: Path) -> None:
    path = folder / RANK1
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    refused(folder, rf"{RANK1} has {size - 1} bytes, expected {size}")


def test_missing(folder: Path) -> None:
    (folder / RANK1).unlink()
    refused(folder, f"{RANK1} is missing")


def test_altered_data_is_found_by_hashes(folder: Path) -> None:
    path = folder / RANK1
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    Artifact.open(folder)
    refused(folder, f"{RANK1} has sha256 [0-9a-f]{{64}}, expected [0-9a-f]{{64}}", verify=True)


def test_altered_tokenizer_is_found(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text + " ")
    refused(folder, r"config\.json has \d+ bytes, expected")


def test_altered_header(folder: Path) -> None:
    path = folder / RANK1
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    refused(folder, rf"{RANK1}: tensor '.*' is I32 .*, expected F32")


def test_header_checks(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("decoder.0.up.weight"))
    refused(folder, rf"{RANK1} lacks tensors: decoder\.0\.up\.weight")


def test_extra_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))
    refused(folder, f"{RANK1} holds unexpected tensors: extra")


def test_misshapen_tensor(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"decoder.norm.weight": torch.zeros(15)}))
    refused(folder, r"'decoder\.norm\.weight' is F32 \[15\], expected F32 \[16\]")


def test_swapped_ranks_are_found_by_hashes(folder: Path) -> None:
    first, second = folder / "rank-0-of-2.safetensors", folder / RANK1
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    refused(folder, "has sha256", verify=True)


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (lambda d: d.update(format_version=2), "format_version is 2, .* supports 1"),
    "no version": (lambda d: d.pop("format_version"), "format_version is None"),
    "true version": (lambda d: d.update(format_version=True), "format_version is True"),
    "unknown field": (lambda d: d.update(extra=1), "extra: "),
    "missing field": (lambda d: d.pop("dtype"), "dtype: Field required"),
    "dtype": (lambda d: d.update(dtype="int3"), "dtype: Input should be 'fp32'"),
    "other dtype": (lambda d: d.update(dtype="bf16"), r"is F32 \[.*expected BF16"),
    "degree type": (lambda d: d.update(tensor_parallel="2"), "tensor_parallel: "),
    "degree": (lambda d: d.update(tensor_parallel=4), "tensor_parallel is 4, but files has 3"),
    "huge degree": (lambda d: d.update(tensor_parallel=10**12), "files has 3 entries"),
    "other degree": (lambda d: d.update(tensor_parallel=1), "files lacks rank-0-of-1"),
    "bad degree": (
        lambda d: (
            d.update(tensor_parallel=3),
            d["files"].update(
                {f"rank-{i}-of-3.safetensors": {"size": 0, "sha256": "0" * 64} for i in range(3)}
            ),
        ),
        "tensor_parallel is 3, which the spec cannot have",
    ),
    "traversal": (
        lambda d: d["files"].update({"../x": {"size": 0, "sha256": "0" * 64}}),
        "files names '../x', expected plain file names",
    ),
    "bad hash": (lambda d: d["files"][RANK1].update(sha256="xyz"), "files.*sha256"),
    "negative size": (lambda d: d["files"][RANK1].update(size=-1), "files.*size"),
    "spec field": (lambda d: d["spec"].update(surprise=1), "unknown fields: surprise"),
    "spec value": (lambda d: d["spec"].update(hidden="wide"), "spec field hidden"),
    "spec size": (lambda d: d["spec"].update(ffn=48), r"expected F32 \[48, 16\]"),
    "spec layers": (lambda d: d["spec"].update(decoder_layers=10**9), "too few for the spec"),
    "one layer more": (lambda d: d["spec"].update(decoder_layers=3), r"lacks decoder\.2\."),
    "spec family": (lambda d: d["spec"].update(family="rwkv"), "spec.family is 'rwkv'"),
    "tensor lacking": (
        lambda d: d["tensors"].remove("decoder.1.out.weight"),
        r"tensors lacks decoder\.1\.out\.weight",
    ),
    "tensor unknown": (lambda d: d["tensors"].append("decoder.9.out.weight"), "unknown"),
    "tensor twice": (lambda d: d["tensors"].append(d["tensors"][0]), "repeated"),
    "bias that is not there": (
        lambda d: d["tensors"].append("decoder.1.out.bias"),
        r"lacks tensors: decoder\.1\.out\.bias",
    ),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_bad_manifests(folder: Path, case: str) -> None:
    edit, message = MANIFESTS[case]
    edit_manifest(folder, edit)
    refused(folder, message)


def test_tampered_position_of_a_family(folder: Path) -> None:
    edit_manifest(folder, lambda data: data["spec"].update(family="t5"))
    refused(folder, "tensors lacks shared|tensors lacks encoder|lacks")


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000])
def test_manifest_that_is_no_object(folder: Path, text: str) -> None:
    (folder / "lmi_multi.json").write_text(text)
    refused(folder, r"lmi_multi\.json")


def test_no_artifact(tmp_path: Path) -> None:
    assert not is_artifact(tmp_path)
    refused(tmp_path, r"is no artifact: it has no lmi_multi\.json")
    refused(tmp_path / "none", "is no artifact: it does not exist")


def test_invalid_ranks(folder: Path) -> None:
    artifact = Artifact.open(folder)
    with pytest.raises(OptionError, match=r"tensor_parallel is 3, .* over 1, 2, 4"):
        artifact.load_rank(0, 3)
    with pytest.raises(OptionError, match=r"rank is 2, must be in 0\.\.1"):
        artifact.load_rank(2, 2)
    with pytest.raises(OptionError, match="rank is -1"):
        artifact.tensor_bytes(-1, 2)
    with pytest.raises(OptionError, match="tensor_parallel is 0"):
        artifact.load_rank(0, 0)


def test_file_that_breaks_after_opening(folder: Path) -> None:
    artifact = Artifact.open(folder)
    (folder / RANK1).write_bytes(b"")
    for degree in (1, 2):
        with pytest.raises(CheckpointError, match="changed while it was read"):
            artifact.load_rank(degree - 1, degree)


def test_vocabulary_is_padded_with_zeros(folder: Path) -> None:
    artifact = Artifact.open(folder)  # 37 rows
    for degree, rows in ((1, 37), (2, 19), (4, 10)):
        last = artifact.load_rank(degree - 1, degree)["embed.weight"]
        assert last.shape == (rows, 16)
        padding = rows * degree - 37
        assert padding == 0 or not last[-padding:].any()
        assert last[-padding - 1].any()


def test_loaded_tensors_outlive_the_artifact(folder: Path) -> None:
    tensors = Artifact.open(folder).load_rank(1, 2)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for path in folder.iterdir():
        path.unlink()
    assert all(torch.equal(before[name], tensors[name]) for name in before)
