"""Sources on S3: what is fetched, where it lands, and that nothing is fetched twice."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lmi_multi
from lmi_multi.checkpoint import convert as converting
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.cache import open_or_convert
from lmi_multi.checkpoint.inspect import describe
from lmi_multi.checkpoint.s3.address import Address
from lmi_multi.checkpoint.s3.download import download
from lmi_multi.checkpoint.source import resolve
from lmi_multi.cli.main import run
from lmi_multi.errors import CheckpointError, OptionError
from tests.families import FAMILIES

from .s3_server import BUCKET, Door, names
from .tiny import llama_state, write, write_sharded


def fetched(door: Door) -> set[str]:
    return {request.name for request in door.data}


# Addresses


def test_addresses() -> None:
    address = Address.parse("s3://bucket/a/b//")
    assert (address.bucket, address.prefix, str(address)) == ("bucket", "a/b", "s3://bucket/a/b")
    assert address.key("x") == "a/b/x" and address.url("x") == "s3://bucket/a/b/x"
    whole = Address.parse("s3://bucket")
    assert (whole.start, whole.key("x"), str(whole)) == ("", "x", "s3://bucket")


@pytest.mark.parametrize("text", ["s3://", "s3:///a", "s3://a b/c", "s3://x", "S3://bucket/a"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(OptionError, match="expected s3://BUCKET/PREFIX"):
        Address.parse(text)


def test_a_revision_is_refused(s3: Door) -> None:
    with pytest.raises(OptionError, match="revision is 'main', but s3://models/x is on S3"):
        resolve("s3://models/x", revision="main")
    assert not s3.requests


# What is fetched


def test_load_and_generate(s3: Door, tmp_path: Path) -> None:
    FAMILIES["gpt2"].save(tmp_path / "gpt2")
    url = s3.put("gpt2", tmp_path / "gpt2")
    prompts, options = [[5, 6, 7], [8]], {"max_new_tokens": 8, "ignore_eos": True}
    answers = []
    for source in (url, tmp_path / "gpt2"):
        with lmi_multi.load(source, backend="cpu") as model:
            answers.append([c.token_ids for c in model.generate(prompts, **options)])
    assert answers[0] == answers[1] and len(answers[0][0]) == 8


def test_only_what_a_checkpoint_needs(s3: Door, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{}")
    url = s3.put("m", checkpoint)
    for name in ("README.md", "modeling.py", "pytorch_model.bin", "onnx/model.safetensors", ""):
        s3.client.put_object(Bucket=BUCKET, Key=f"m/{name}", Body=b"x")
    found = resolve(url + "/")
    assert found.name == url and found.revision == found.folder.name
    assert names(found.folder) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert fetched(s3) == names(found.folder)
    for path in checkpoint.iterdir():
        assert (found.folder / path.name).read_bytes() == path.read_bytes()
    assert all(request.if_match and request.range for request in s3.data)


def test_bin_files_where_there_are_no_safetensors(s3: Door, tmp_path: Path) -> None:
    url = s3.put("bin", write_sharded(tmp_path / "bin", llama_state(), "bin"))
    loaded = open_or_convert(url).load_rank(0, 1)
    assert torch.equal(loaded["embed.weight"], llama_state()["model.embed_tokens.weight"])


def test_raw_files_of_fastertransformer(s3: Door, tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    for name in ("config.ini", "model.wte.bin", "README.md"):
        (folder / name).write_bytes(b"x")
    assert names(resolve(s3.put("raw", folder)).folder) == {"config.ini", "model.wte.bin"}


def test_the_bucket_itself(s3: Door, checkpoint: Path) -> None:
    s3.client.create_bucket(Bucket="whole")
    for path in checkpoint.iterdir():
        s3.client.put_object(Bucket="whole", Key=path.name, Body=path.read_bytes())
    assert names(resolve("s3://whole").folder) == names(checkpoint)


@pytest.mark.parametrize("key", ["evil/..", "evil/../outside", "evil//etc/passwd", "evil/a\\b"])
def test_keys_that_lead_out_are_refused(s3: Door, checkpoint: Path, key: str) -> None:
    url = s3.put("evil", checkpoint)
    page = {"Contents": [{"Key": key, "Size": 1, "ETag": '"e"'}]}
    inner = key.removeprefix("evil/")
    if "/" in inner:  # as S3 groups what lies deeper
        page = {"CommonPrefixes": [{"Prefix": f"evil/{inner.split('/')[0]}/"}]}

    class Listing:
        """A client whose bucket holds the key; moto itself refuses some of them."""

        def get_paginator(self, operation: str) -> Listing:
            return self

        def paginate(self, **_: object) -> list[object]:
            return [page]

    from lmi_multi.checkpoint.s3.listing import list_folder

    with pytest.raises(CheckpointError, match=r"leads out of the folder") as caught:
        list_folder(Listing(), Address.parse(url))
    assert repr(f"evil/{inner.split('/')[0]}")[1:-1] in str(caught.value)


def test_a_backslash_on_the_server(s3: Door, checkpoint: Path, cache: Path) -> None:
    url = s3.put("evil", checkpoint)
    s3.client.put_object(Bucket=BUCKET, Key="evil/..\\x", Body=b"x")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        resolve(url)
    assert not s3.data and not cache.exists()


# The cache


def test_a_second_use_reads_no_data(s3: Door, checkpoint: Path) -> None:
    url = s3.put("m", checkpoint)
    first = open_or_convert(url, dtype="bf16")
    assert s3.data
    s3.requests.clear()
    second = open_or_convert(url, dtype="bf16")
    assert first.folder == second.folder and not s3.data and len(s3.requests) == 1
    open_or_convert(url, dtype="fp32", quantize="int8")  # converts, but fetches nothing
    assert not s3.data


def test_a_change_is_another_revision(s3: Door, checkpoint: Path) -> None:
    url = s3.put("m", checkpoint)
    first = resolve(url)
    write(checkpoint, llama_state(seed=1))
    s3.put("m", checkpoint)
    second = resolve(url)
    assert first.revision != second.revision and first.folder.is_dir()
    assert fetched(s3) == {"config.json", "model.safetensors"}
    assert (second.folder / "model.safetensors").read_bytes() == (
        checkpoint / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("fault", ["truncated", "missing", "added"])
def test_damaged_downloads_are_repeated(
    s3: Door, checkpoint: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = s3.put("m", checkpoint)
    folder = resolve(url).folder
    if fault == "truncated":
        (folder / "model.safetensors").write_bytes(b"short")
    elif fault == "missing":
        (folder / "config.json").unlink()
    else:
        (folder / "pytorch_model.bin").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert names(resolve(url).folder) == names(checkpoint)
    assert "is damaged and will be repeated" in caplog.text
    assert (folder / "model.safetensors").stat().st_size > 5


def test_progress_counts_every_byte(s3: Door, checkpoint: Path) -> None:
    url = s3.put("m", checkpoint)
    seen: list[tuple[int, int, str]] = []
    resolve(url, progress=lambda *state: seen.append(state))
    total = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert seen[-1][:2] == (total, total) and {s[2] for s in seen} == names(checkpoint)
    assert [s[0] for s in seen] == sorted(s[0] for s in seen)


# Artifacts


def test_artifacts_open_where_they_land(
    s3: Door, artifact: Artifact, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    url = s3.put("a", artifact.folder)
    s3.client.put_object(Bucket=BUCKET, Key="a/vocab.unnamed", Body=b"no file of the manifest")

    def never(*args: object, **options: object) -> None:
        raise AssertionError("converted")

    monkeypatch.setattr(converting, "_Job", never)
    opened = open_or_convert(url, tensor_parallel=2, verify=True)
    assert opened.manifest == artifact.manifest and opened.folder.is_relative_to(cache)
    assert names(opened.folder) == names(artifact.folder)
    s3.requests.clear()
    open_or_convert(url)
    assert not s3.data
    assert describe(url).tensor_parallel == 2


def test_the_manifest_comes_first(s3: Door, artifact: Artifact) -> None:
    (artifact.folder / "rank-1-of-2.safetensors").write_bytes(b"short")
    url = s3.put("a", artifact.folder)
    size = artifact.manifest.files["rank-1-of-2.safetensors"].size
    with pytest.raises(
        CheckpointError,
        match=rf"s3://models/a/rank-1-of-2.safetensors has 5 bytes, expected {size} by lmi_multi",
    ):
        resolve(url)
    assert fetched(s3) == {"lmi_multi.json"}
    s3.client.delete_object(Bucket=BUCKET, Key="a/rank-1-of-2.safetensors")
    with pytest.raises(CheckpointError, match=r"s3://models/a/rank-1-of-2.safetensors is missing"):
        resolve(url)


def test_altered_weights(s3: Door, artifact: Artifact) -> None:
    path = artifact.folder / "rank-1-of-2.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    url = s3.put("a", artifact.folder)
    for _ in range(2):  # what is wrong is not kept for the next attempt
        with pytest.raises(CheckpointError, match=r"s3://models/a/rank-1.* has sha256 .*expected"):
            open_or_convert(url)
    path.write_bytes(good)
    s3.put("a", artifact.folder)
    open_or_convert(url, verify=True)


def test_malformed_manifest(s3: Door, artifact: Artifact) -> None:
    (artifact.folder / "lmi_multi.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"^s3://models/a/lmi_multi.json cannot be read"):
        resolve(s3.put("a", artifact.folder))


def test_one_rank_fetches_only_its_shard(s3: Door, artifact: Artifact) -> None:
    url = s3.put("a", artifact.folder)
    own = open_or_convert(url, tensor_parallel=2, rank=1, verify=True)
    assert "rank-0-of-2.safetensors" not in fetched(s3) | names(own.folder)
    assert "rank-1-of-2.safetensors" in names(own.folder)
    expected = artifact.load_rank(1, 2)
    loaded = own.load_rank(1, 2)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    s3.requests.clear()
    open_or_convert(url, tensor_parallel=2, rank=1)
    assert not s3.data
    with pytest.raises(CheckpointError, match="changed while it was read"):
        own.load_rank(0, 2)
    with pytest.raises(CheckpointError, match=r"the artifact has no rank-2-of-2.safetensors"):
        open_or_convert(url, tensor_parallel=2, rank=2)


@pytest.mark.parametrize("degree", [1, 4])
def test_a_rank_of_another_degree_fetches_all(s3: Door, artifact: Artifact, degree: int) -> None:
    url = s3.put("a", artifact.folder)
    own = open_or_convert(url, tensor_parallel=degree, rank=degree - 1)
    assert {"rank-0-of-2.safetensors", "rank-1-of-2.safetensors"} <= fetched(s3)
    expected = artifact.load_rank(degree - 1, degree)
    loaded = own.load_rank(degree - 1, degree)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    s3.requests.clear()
    assert open_or_convert(url).folder == own.folder and not s3.data


def test_a_rank_of_what_is_no_artifact_converts_it(s3: Door, checkpoint: Path) -> None:
    url = s3.put("m", checkpoint)
    own = open_or_convert(url, tensor_parallel=2, rank=1)
    assert own.tensor_parallel == 2 and own.load_rank(0, 2)
    assert open_or_convert(url, tensor_parallel=2, rank=0).folder == own.folder


# The command line, and what an import costs


def test_commands_take_addresses(
    s3: Door, checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    url = s3.put("m", checkpoint)
    assert run(["inspect", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == url
    assert run(["convert", url, str(tmp_path / "out")]) == 0
    assert Artifact.open(tmp_path / "out").manifest.source.name == url
    assert run(["inspect", "s3://models/none"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: s3://models/none/ holds no")


def test_boto3_is_imported_only_when_needed() -> None:
    code = (
        "import sys, lmi_multi.checkpoint.publish, lmi_multi.model; "
        "sys.exit(bool({'boto3', 'botocore', 'awscrt', 's3transfer'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=240).returncode == 0


def test_folder_that_is_in_the_way(s3: Door, checkpoint: Path, cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(CheckpointError, match="LMI_MULTI_CACHE names another folder"):
        resolve(s3.put("m", checkpoint))
    cache.unlink()
    found = download(Address.parse("s3://models/m"))
    shutil.rmtree(cache)
    assert download(Address.parse("s3://models/m")) == found
