"""Reading checkpoints: both formats, single and sharded, and indexes that lie."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lmi_multi.checkpoint.reader import CheckpointReader
from lmi_multi.errors import CheckpointError

from .tiny import State, llama_state, write, write_sharded


def check(folder: Path, state: State) -> None:
    reader = CheckpointReader(folder)
    assert {n: (i.shape, i.dtype) for n, i in reader.tensors.items()} == {
        n: (tuple(t.shape), t.dtype) for n, t in state.items()
    }
    for name, tensor in state.items():
        assert torch.equal(reader.read(name), tensor)
        assert torch.equal(reader.read(name, 1, 3), tensor[1:3])


def test_single_safetensors(tmp_path: Path) -> None:
    state = llama_state()
    check(write(tmp_path / "c", state), state)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded(tmp_path: Path, suffix: str) -> None:
    state = llama_state()
    check(write_sharded(tmp_path / "c", state, suffix), state)


@pytest.mark.parametrize("zipped", [True, False])
def test_single_bin(tmp_path: Path, zipped: bool) -> None:
    state = llama_state()
    state["half"] = torch.randn(4, 6).to(torch.bfloat16)
    state["transposed"] = torch.randn(4, 6).t()
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    check(tmp_path, state)


def test_bin_map_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmi_multi.checkpoint.reader._MAP_BUDGET", 100)
    state = llama_state()
    check(write_sharded(tmp_path, state, "bin", shards=1), state)


def test_safetensors_win_over_bin(tmp_path: Path) -> None:
    state = llama_state()
    folder = write(tmp_path, state)
    torch.save({"other": torch.zeros(1)}, folder / "pytorch_model.bin")
    check(folder, state)


def test_tensors_are_independent_of_the_file(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a": torch.ones(8)})
    tensor = CheckpointReader(folder).read("a")
    (folder / "model.safetensors").write_bytes(b"")
    assert torch.equal(tensor, torch.ones(8))


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors.*found none"):
        CheckpointReader(tmp_path)
    (tmp_path / "tf_model.h5").touch()
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"found model-00001-of-00002.*tf_model\.h5"):
        CheckpointReader(tmp_path)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("lmi_multi_was_here"),))


BAD_BIN: dict[str, tuple[Any, str]] = {
    "empty": (b"", "has 0 bytes"),
    "noise": (b"\x80\x02noise" * 20, "not a readable PyTorch file"),
    "zip noise": (b"PK\x03\x04" + bytes(300), "not a readable PyTorch file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\nsize 99\n", "expected 99 bytes"),
    "code": (pickle.dumps(Evil(), protocol=2), "not a readable PyTorch file"),
    "list": ([torch.zeros(1)], "holds a list, expected a dict"),
    "nested": ({"model": {"a": torch.zeros(1)}}, "'model' is a dict, expected a tensor"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "not a dense tensor"),
}


@pytest.mark.parametrize("case", BAD_BIN)
def test_refuses_bad_bin(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = BAD_BIN[case]
    path = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointReader(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "lmi_multi_was_here").exists()


@pytest.mark.parametrize("part", [0.2, 0.6, 0.98])
def test_refuses_truncated_bin(tmp_path: Path, part: float) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(llama_state(), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(CheckpointError, match="not a readable PyTorch file"):
        CheckpointReader(tmp_path)


def edit_index(folder: Path, **changes: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", "x.bin", 7, None],
)
def test_index_may_only_name_files_beside_it(tmp_path: Path, file: Any) -> None:
    folder = write_sharded(tmp_path / "c", llama_state(), "safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    edit_index(folder, x=file)
    with pytest.raises(CheckpointError, match=r"expected a \*\.safetensors file beside it"):
        CheckpointReader(folder)


def test_missing_shard(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, llama_state(), "safetensors")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing"):
        CheckpointReader(folder)


def test_index_names_a_tensor_that_the_shard_lacks(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, llama_state(), "safetensors")
    edit_index(folder, extra="model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="'extra' is in no file, expected in model-00002"):
        CheckpointReader(folder)


def test_index_names_another_shard(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, llama_state(), "safetensors")
    edit_index(folder, **{"lm_head.weight": "model-00001-of-00003.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"'lm_head\.weight' is in model-00003.*expected in model-00001"
    ):
        CheckpointReader(folder)


def test_shard_holds_a_tensor_that_the_index_lacks(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, llama_state(), "safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"does not name: model\.norm\.weight"):
        CheckpointReader(folder)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, llama_state(), "safetensors")
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match="expected in one file"):
        CheckpointReader(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_bad_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        CheckpointReader(tmp_path)


def test_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a": torch.ones(100)})
    reader = CheckpointReader(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="'a' ends after 360 bytes, expected 400"):
        reader.read("a")
