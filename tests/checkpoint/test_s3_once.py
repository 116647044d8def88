"""What a host that starts all ranks fetches from S3: what they need, each byte of it once."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

import lmi_multi
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.cache import open_or_convert
from lmi_multi.checkpoint.convert import convert
from lmi_multi.checkpoint.s3 import ranges

from .s3_server import BUCKET, Door

PART = 5000  # so that a shard comes in several ranges
UNUSED = ("rank-0-of-2.safetensors", "rank-1-of-2.safetensors", "model.safetensors")


@pytest.fixture
def four(checkpoint: Path, tmp_path: Path) -> Artifact:
    """A Llama for four ranks."""
    return convert(checkpoint, tmp_path / "four", dtype="fp32", tensor_parallel=4)


def put(s3: Door, artifact: Artifact) -> str:
    """The artifact on S3, between a checkpoint's weights and shards of another degree."""
    url = s3.put("four", artifact.folder)
    for name in UNUSED:
        s3.client.put_object(Bucket=BUCKET, Key=f"four/{name}", Body=b"x" * 100)
    return url


def fetched(door: Door) -> dict[str, list[tuple[int, int]]]:
    """The ranges of each object that were asked for, in order; the last byte is the one before."""
    found = defaultdict(list)
    for request in door.data:
        given = re.fullmatch(r"bytes=(\d+)-(\d+)", request.range or "")
        assert given is not None and request.if_match
        found[request.name].append((int(given[1]), int(given[2]) + 1))
    return {name: sorted(parts) for name, parts in found.items()}


def once(folder: Path) -> dict[str, list[tuple[int, int]]]:
    """The same for every file of a folder, fetched once."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    return {
        name: [(start, min(start + PART, size)) for start in range(0, size, PART)]
        for name, size in sizes.items()
    }


@pytest.mark.parametrize("degree", [4, 2])
def test_each_byte_is_fetched_once(
    s3: Door, four: Artifact, degree: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "PART", PART)
    url = put(s3, four)
    with lmi_multi.load(url, backend="cpu", tensor_parallel=degree) as model:
        answers = [c.token_ids for c in model.generate([[5, 6, 7]], max_new_tokens=4)]
    assert fetched(s3) == once(four.folder)
    assert all(len(parts) > 1 for name, parts in fetched(s3).items() if name.startswith("rank"))
    with lmi_multi.load(four.folder, backend="cpu") as model:
        assert answers == [c.token_ids for c in model.generate([[5, 6, 7]], max_new_tokens=4)]


def test_hosts_with_a_rank_each_fetch_a_quarter(
    s3: Door, four: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Together they fetch each shard once, whatever all of them need once each."""
    monkeypatch.setattr(ranges, "PART", PART)
    url = put(s3, four)
    shards: list[str] = []
    for rank in range(4):
        monkeypatch.setenv("LMI_MULTI_CACHE", str(tmp_path / f"host-{rank}"))
        open_or_convert(url, tensor_parallel=4, rank=rank)
        own = fetched(s3)
        assert own.items() <= once(four.folder).items()
        shards += [name for name in own if name.startswith("rank")]
        s3.requests.clear()
    assert shards == [f"rank-{rank}-of-4.safetensors" for rank in range(4)]
