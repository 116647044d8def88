"""Conversion: dtypes, quantization, what is copied, bad values, progress, disk space, memory."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.convert import convert
from lmi_multi.checkpoint.layout import CODES, QuantizeName
from lmi_multi.checkpoint.quantize import quantize as quantized
from lmi_multi.checkpoint.source import resolve
from lmi_multi.checkpoint.writer import RankFile
from lmi_multi.errors import CapacityError, CheckpointError, OptionError

from .tiny import LLAMA, llama_state, t5_config, t5_state, write, write_sharded

log = logging.getLogger(__name__)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)],
)
def test_dtypes(checkpoint: Path, tmp_path: Path, dtype: str, expected: torch.dtype) -> None:
    tensors = convert(checkpoint, tmp_path / "out", dtype=dtype).load_rank(0, 1)
    assert {tensor.dtype for tensor in tensors.values()} == {expected}
    source = llama_state()["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(tensors["decoder.1.down.weight"], source.to(expected))


@pytest.mark.parametrize(
    ("own", "llama", "t5"),
    [
        (torch.float64, "fp32", "fp32"),
        (torch.float32, "fp32", "fp32"),
        (torch.float16, "fp16", "bf16"),
        (torch.bfloat16, "bf16", "bf16"),
    ],
)
def test_auto_dtype(tmp_path: Path, own: torch.dtype, llama: str, t5: str) -> None:
    for name, state, config, expected in (
        ("llama", llama_state(), LLAMA, llama),
        ("t5", t5_state(), t5_config(), t5),
    ):
        folder = write(tmp_path / name, {n: t.to(own) for n, t in state.items()}, config)
        assert convert(folder, tmp_path / f"{name}-out").dtype == expected


def test_fp16_t5_keeps_down_wide(tmp_path: Path) -> None:
    folder = write(tmp_path / "t5", t5_state(), t5_config())
    plain = convert(folder, tmp_path / "plain", dtype="fp16").load_rank(0, 1)
    wide = {name for name, tensor in plain.items() if tensor.dtype == torch.float32}
    assert wide == {"encoder.0.down.weight", "decoder.0.down.weight"}
    for kind in CODES:
        both = convert(folder, tmp_path / kind, dtype="fp16", quantize=kind).load_rank(0, 1)
        assert both["decoder.0.down.weight"].dtype == CODES[kind]
        assert both["decoder.norm.weight"].dtype == torch.float16


@pytest.mark.parametrize("kind", CODES)
def test_quantized_weights_and_scales(checkpoint: Path, tmp_path: Path, kind: QuantizeName) -> None:
    tensors = convert(checkpoint, tmp_path / "out", dtype="bf16", quantize=kind).load_rank(0, 1)
    source = llama_state()["model.layers.0.mlp.down_proj.weight"]
    codes, scale = tensors["decoder.0.down.weight"], tensors["decoder.0.down.scale"]
    assert codes.dtype == CODES[kind] and scale.dtype == torch.float32
    assert torch.equal(scale, source.abs().amax(1) / {"int8": 127, "fp8": 448}[kind])
    error = (codes.float() * scale[:, None] - source).abs()
    if kind == "int8":
        assert error.max() <= scale.max() / 2 + 1e-6
    else:  # half a unit of three bits, or of the smallest code
        assert (error <= (source.abs() / 16).clamp_min(scale[:, None] * 2**-10) + 1e-6).all()
    assert tensors["head.weight"].dtype == CODES[kind]
    assert tensors["embed.weight"].dtype == torch.bfloat16
    assert "embed.scale" not in tensors


@pytest.mark.parametrize("kind", CODES)
def test_scale_is_that_of_whole_rows(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    whole = convert(checkpoint, tmp_path / "1", quantize=kind).load_rank(0, 1)
    halves = convert(checkpoint, tmp_path / "2", quantize=kind, tensor_parallel=2)
    parts = [halves.load_rank(rank, 2) for rank in range(2)]
    for part in parts:
        assert torch.equal(part["decoder.0.down.scale"], whole["decoder.0.down.scale"])
    joined = torch.cat([part["decoder.0.down.weight"] for part in parts], 1)
    assert torch.equal(joined, whole["decoder.0.down.weight"])


TINY = torch.finfo(torch.float32).tiny * 2**-20
EDGES = torch.tensor([[0.0, 0.0], [-1.0, 1.0], [1e-30, 3e-30], [TINY, -TINY], [3e38, 1e38]])


@pytest.mark.parametrize("kind", CODES)
def test_quantize_edges(kind: QuantizeName) -> None:
    codes, scale = quantized(EDGES, CODES[kind])
    codes = codes.float()
    largest = {"int8": 127, "fp8": 448}[kind]
    assert codes[0].tolist() == [0, 0] and scale[0] == 1
    assert codes[1].tolist() == [-largest, largest]
    assert codes[2].tolist() == {"int8": [42, 127], "fp8": [144, 448]}[kind]
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert codes.abs().max() == largest


def test_fp8_rounds_to_the_nearest_and_between_two_to_the_even() -> None:
    exact = torch.tensor([448.0, 17.0, 19.0, 17.1, -27.0, 2**-9, 2**-10, 1.5 * 2**-9, 447.0])
    codes, scale = quantized(exact[None], torch.float8_e4m3fn)
    assert scale.tolist() == [1.0]
    expected = [448, 16, 20, 18, -28, 2**-9, 0, 2**-8, 448]
    assert codes[0].float().tolist() == expected


@pytest.mark.parametrize("kind", CODES)
def test_quantize_in_chunks(monkeypatch: pytest.MonkeyPatch, kind: QuantizeName) -> None:
    weight = torch.randn(37, 11)
    whole = quantized(weight, CODES[kind])
    monkeypatch.setattr("lmi_multi.checkpoint.quantize._ROW_BYTES", 100)
    parts = quantized(weight, CODES[kind])
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_chunked_writing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = convert(checkpoint, tmp_path / "a", tensor_parallel=2)
    monkeypatch.setattr("lmi_multi.checkpoint.convert.CHUNK_ELEMENTS", 50)
    chunked = convert(checkpoint, tmp_path / "b", tensor_parallel=2)
    assert plain.manifest.files == chunked.manifest.files


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_sources_give_the_same_files(tmp_path: Path, suffix: str) -> None:
    state = llama_state()
    single = convert(write(tmp_path / "single", state), tmp_path / "a")
    sharded = convert(write_sharded(tmp_path / "sharded", state, suffix), tmp_path / "b")
    assert single.manifest.files == sharded.manifest.files


@pytest.mark.parametrize("kind", CODES)
def test_odd_sizes_stay_aligned(tmp_path: Path, kind: QuantizeName) -> None:
    config = LLAMA | {"intermediate_size": 23, "vocab_size": 37}
    folder = write(tmp_path / "c", llama_state(config), config)
    artifact = convert(folder, tmp_path / "out", dtype="bf16", quantize=kind)
    Artifact.open(artifact.folder, verify_hashes=True)
    source = llama_state(config)["model.layers.1.mlp.down_proj.weight"]
    reference = quantized(source, CODES[kind])
    tensors = artifact.load_rank(0, 1)
    assert torch.equal(tensors["decoder.1.down.weight"], reference[0])
    assert torch.equal(tensors["decoder.1.down.scale"], reference[1])


def test_rank_files_are_plain_safetensors(checkpoint: Path, tmp_path: Path) -> None:
    artifact = convert(checkpoint, tmp_path / "out", tensor_parallel=2)
    for rank in range(2):
        path = artifact.folder / f"rank-{rank}-of-2.safetensors"
        with safe_open(path, framework="pt") as file:
            assert file.get_tensor("embed.weight").shape == (19, 16)
        assert int.from_bytes(path.read_bytes()[:8], "little") % 64 == 56


def test_side_files(checkpoint: Path, tmp_path: Path) -> None:
    wanted = ["tokenizer.json", "tokenizer_config.json", "merges.txt", "vocab.txt", "spiece.model"]
    wanted += ["generation_config.json", "special_tokens_map.json", "chat_template.jinja"]
    for name in (*wanted, "modeling.py", "tokenizer.json.py", "README.md", "optimizer.pt"):
        (checkpoint / name).write_text(name)
    artifact = convert(checkpoint, tmp_path / "out")
    expected = {*wanted, "config.json", "rank-0-of-1.safetensors", "lmi_multi.json"}
    assert {path.name for path in artifact.folder.iterdir()} == expected
    assert set(artifact.manifest.files) == expected - {"lmi_multi.json"}
    assert (artifact.folder / "vocab.txt").read_text() == "vocab.txt"


def test_manifest(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "out", dtype="bf16", quantize="int8", tensor_parallel=2)
    data = json.loads((tmp_path / "out" / "lmi_multi.json").read_text())
    assert data["format_version"] == 1 and data["dtype"] == "bf16" and data["quantize"] == "int8"
    assert data["tensor_parallel"] == 2 and data["spec"]["family"] == "llama"
    assert data["source"]["name"] == str(checkpoint)
    assert data["source"]["revision"].startswith("local-")


def test_resolved_sources(checkpoint: Path, tmp_path: Path) -> None:
    source = resolve(checkpoint)
    assert convert(source, tmp_path / "out").manifest.source.revision == source.revision
    with pytest.raises(OptionError, match="revision"):
        convert(source, tmp_path / "other", revision="main")


def test_progress_ends_at_the_total(checkpoint: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    artifact = convert(
        checkpoint,
        tmp_path / "out",
        tensor_parallel=2,
        progress=lambda done, total, name: calls.append((done, total, name)),
    )
    done = [call[0] for call in calls]
    assert done == sorted(done) and done[-1] == calls[0][1] == 2 * artifact.tensor_bytes(0, 2)
    assert {call[2] for call in calls} == set(artifact.manifest.tensors)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight"])
def test_bad_values_are_named(tmp_path: Path, bad: float, name: str) -> None:
    state = llama_state()
    state[name].view(-1)[-1] = bad
    folder = write(tmp_path / "c", state)
    with pytest.raises(CheckpointError, match=f"tensor '{name}' holds NaN or infinity"):
        convert(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_fp16_overflow_suggests_bf16(tmp_path: Path) -> None:
    state = llama_state()
    state["model.layers.0.mlp.up_proj.weight"][3, 3] = -70000.0
    folder = write(tmp_path / "c", state)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight holds 70000.*65504.*use bf16"):
        convert(folder, tmp_path / "out", dtype="fp16")
    convert(folder, tmp_path / "out", dtype="bf16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype is 'float16', must be one of auto, fp32, fp16, bf16"),
        ({"quantize": "int4"}, "quantize is 'int4', must be one of None, int8, fp8"),
        ({"tensor_parallel": 0}, "tensor_parallel is 0, must be an integer above 0"),
        ({"tensor_parallel": True}, "tensor_parallel is True"),
        ({"tensor_parallel": 3}, r"tensor_parallel is 3, but heads 4.* over 1, 2, 4"),
    ],
)
def test_invalid_options(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        convert(checkpoint, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_artifact_is_no_source(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is an artifact already"):
        convert(tmp_path / "out", tmp_path / "again")


Usage = namedtuple("Usage", "total used free")


def test_too_little_space_is_told_before(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 2**40, 2**19))
    with pytest.raises(CapacityError, match=r"has 0\.50 MiB free, the artifact needs 1\.\d+ MiB"):
        convert(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_disk_that_fills_up(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(checkpoint, tmp_path / "out")
    before = (tmp_path / "out" / "lmi_multi.json").read_bytes()
    plain = RankFile._put

    def put(self: RankFile, offset: int, data: memoryview) -> None:
        if offset > 9000:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(self, offset, data)

    monkeypatch.setattr(RankFile, "_put", put)
    with pytest.raises(
        CapacityError, match=r"filled up.* needs .* MiB more than there was room for"
    ):
        convert(checkpoint, tmp_path / "out", dtype="bf16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out"]
    assert (tmp_path / "out" / "lmi_multi.json").read_bytes() == before


def test_target_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert(checkpoint, tmp_path / "file" / "out")


PEAK = """
import re, sys
from pathlib import Path
import torch, pydantic, safetensors
from lmi_multi.checkpoint.convert import convert

def peak():  # getrusage would count the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
torch.isfinite(torch.ones(1000).to(torch.bfloat16)).all()  # code pages belong to the baseline
before = peak()
convert(sys.argv[1], sys.argv[2], dtype=sys.argv[3], quantize=sys.argv[4] or None,
        tensor_parallel=2)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """About 500 MB in fp32, the largest tensor 82 MB."""
    folder = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(folder).free < 3e9:
        pytest.skip("less than 3 GB of free disk")
    config = LLAMA | {
        "vocab_size": 20_000,
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 4096,
        "num_hidden_layers": 5,
    }
    state = llama_state(config | {"num_hidden_layers": 0})
    layer = llama_state(config | {"num_hidden_layers": 1, "vocab_size": 1})
    parts = {name: tensor for name, tensor in layer.items() if ".layers.0." in name}
    for i in range(5):
        state |= {n.replace(".layers.0.", f".layers.{i}."): t.clone() for n, t in parts.items()}
    write(folder / "safetensors", state, config)
    (folder / "bin").mkdir()
    shutil.copy(folder / "safetensors" / "config.json", folder / "bin")
    torch.save(state, folder / "bin" / "pytorch_model.bin")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("kind", "dtype", "quantize"),
    [
        ("safetensors", "bf16", ""),
        ("safetensors", "fp32", "int8"),
        ("safetensors", "fp32", "fp8"),
        ("bin", "bf16", ""),
    ],
)
def test_peak_memory(large: Path, tmp_path: Path, kind: str, dtype: str, quantize: str) -> None:
    arguments = [str(large / kind), str(tmp_path / "out"), dtype, quantize]
    result = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], check=True, capture_output=True, text=True
    )
    largest = 20_000 * 1024 * 4
    # A mapped .bin keeps up to 256 MiB of read pages resident, which the system can take back.
    allowed = 2 * largest + (456 if kind == "bin" else 200) * 2**20
    log.info("peak %s %s %s: %.0f MiB", kind, dtype, quantize, int(result.stdout) / 2**20)
    assert int(result.stdout) < allowed
    shutil.rmtree(tmp_path / "out")


def test_saved_tensors_are_not_shared_names(tmp_path: Path) -> None:
    """A file that safetensors wrote with metadata is read as any other."""
    folder = write(tmp_path / "c", llama_state())
    save_file(llama_state(), folder / "model.safetensors", metadata={"format": "pt"})
    convert(folder, tmp_path / "out")
