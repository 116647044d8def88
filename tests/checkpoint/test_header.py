"""safetensors headers: what is accepted, and every way in which a file can lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lmi_multi.checkpoint.header import MAX_HEADER, build_header, read_header
from lmi_multi.errors import CheckpointError

from .tiny import raw_safetensors


def entry(shape: Any = (2, 3), dtype: Any = "F32", offsets: Any = (0, 24)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(2, 3),
        "b": torch.zeros(0, 4, dtype=torch.bfloat16),
        "c": torch.tensor(1.0, dtype=torch.float64),
        "d": torch.zeros(5, dtype=torch.int8),
        "e": torch.zeros(5, 2, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    infos = read_header(tmp_path / "x.safetensors")
    assert {name: (i.shape, i.dtype) for name, i in infos.items()} == {
        name: (tuple(t.shape), t.dtype) for name, t in tensors.items()
    }


BROKEN: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b"{nope", b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "deep": (b"[" * 100_000, b"", "not valid JSON"),
    "a list": ([], b"", "header is a list, expected an object"),
    "twice": (b'{"a": 1, "a": 2}', b"", "names 'a' twice"),
    "no dtype": ({"a": {"shape": [1]}}, b"", "expected dtype, shape and data_offsets"),
    "not an entry": ({"a": 3}, b"", "expected dtype, shape and data_offsets"),
    "wrong dtype": ({"a": entry(dtype="F31")}, bytes(24), "dtype is 'F31', expected one of BOOL"),
    "dtype no string": ({"a": entry(dtype=[])}, bytes(24), r"dtype is \[\]"),
    "negative size": ({"a": entry(shape=[-2, -3])}, bytes(24), r"shape is \[-2, -3\]"),
    "bool size": ({"a": entry(shape=[True, 6])}, bytes(24), "shape is"),
    "float size": ({"a": entry(shape=[2.0, 3])}, bytes(24), "shape is"),
    "overflow": ({"a": entry(shape=[2**32, 2**32])}, bytes(24), "fits 63 bits"),
    "wrap to small": ({"a": entry(shape=[2**62, 8, 3])}, bytes(24), "fits 63 bits"),
    "many dimensions": ({"a": entry(shape=[1] * 70)}, bytes(24), "shape is"),
    "lying shape": ({"a": entry(shape=[2, 4])}, bytes(24), "span 24 bytes, expected 32"),
    "one offset": ({"a": entry(offsets=[24])}, bytes(24), "data_offsets is"),
    "reversed": ({"a": entry(offsets=[24, 0])}, bytes(24), "start <= stop"),
    "negative offset": ({"a": entry(offsets=[-24, 0])}, bytes(24), "data_offsets is"),
    "beyond the file": ({"a": entry(offsets=[0, 24])}, bytes(20), "is truncated"),
    "far beyond": ({"a": entry(offsets=[2**40, 2**40 + 24])}, bytes(24), "leaves a gap"),
    "gap at start": ({"a": entry(offsets=[8, 32])}, bytes(32), "leaves a gap"),
    "gap": ({"a": entry(), "b": entry(offsets=[32, 56])}, bytes(56), "'b' leaves a gap"),
    "overlap": ({"a": entry(), "b": entry(offsets=[16, 40])}, bytes(40), "'b' overlaps"),
    "same bytes": ({"a": entry(), "b": entry()}, bytes(24), "'b' overlaps"),
    "trailing bytes": ({"a": entry()}, bytes(30), "belong to no tensor"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refuses(tmp_path: Path, case: str) -> None:
    header, data, message = BROKEN[case]
    path = raw_safetensors(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_lying_lengths(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    raw_safetensors(path, {"a": entry()}, bytes(24), length=10_000)
    with pytest.raises(CheckpointError, match=r"truncated: .* expected at least 10008"):
        read_header(path)
    raw_safetensors(path, {"a": entry()}, bytes(24), length=2**63 + 5)
    with pytest.raises(CheckpointError, match=f"expected at most {MAX_HEADER}"):
        read_header(path)
    raw_safetensors(path, {"a": entry()}, bytes(24), length=20)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 40])
def test_refuses_truncated_headers(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 3)}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="bytes, expected"):
        read_header(path)


def test_names_git_lfs_pointers(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 5678\n")
    with pytest.raises(
        CheckpointError, match=r"git-LFS pointer, expected 5678 bytes.*git lfs pull"
    ):
        read_header(path)


def test_refuses_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors is missing"):
        read_header(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="is missing"):
        read_header(tmp_path)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_random_bytes_raise_nothing_else(tmp_path_factory: Any, body: bytes, length: int) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + body)
    try:
        read_header(path)
    except CheckpointError:
        return


VALID = json.dumps({"a": entry(), "b": entry(offsets=[24, 48])}).encode()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(VALID) - 1), st.integers(0, 255))
def test_altered_headers_raise_nothing_else(tmp_path_factory: Any, at: int, byte: int) -> None:
    path = tmp_path_factory.getbasetemp() / "altered.safetensors"
    raw_safetensors(path, VALID[:at] + bytes([byte]) + VALID[at + 1 :], bytes(48))
    try:
        infos = read_header(path)
    except CheckpointError:
        return
    assert sum(info.nbytes for info in infos.values()) == 48


def test_built_headers_are_aligned_and_readable(tmp_path: Path) -> None:
    layout = [("x", (3, 5), torch.float32), ("y", (), torch.bfloat16), ("z", (0, 2), torch.int8)]
    header, infos = build_header(layout)
    assert len(header) % 64 == 0 and infos["x"].start == len(header)
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(62))
    assert read_header(path) == infos
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["x", "y", "z"]
        assert file.get_tensor("x").shape == (3, 5)
