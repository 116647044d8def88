"""Ranks that a remote checkpoint's config forbids are refused before its weights are fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmi_multi import load
from lmi_multi.checkpoint.convert import convert
from lmi_multi.errors import CheckpointError, OptionError, UnsupportedModelError

from .s3_server import Door


def fetched(s3: Door) -> set[str]:
    return {request.name for request in s3.data}


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"tensor_parallel": 3}, "tensor_parallel is 3, .* over 1, 2, 4"),
        ({"pipeline_parallel": 3}, "pipeline_parallel is 3"),
    ],
)
def test_ranks_are_refused_by_the_config_alone(
    s3: Door, checkpoint: Path, tmp_path: Path, ranks: dict[str, Any], message: str
) -> None:
    convert(checkpoint, tmp_path / "out")
    for folder, files in ((checkpoint, {"config.json"}), (tmp_path / "out", {"lmi_multi.json"})):
        url = s3.put(folder.name, folder)
        with pytest.raises(OptionError, match=message):
            load(url, backend="cpu", **ranks)
        assert fetched(s3) - {"config.json"} == files - {"config.json"}


def test_what_no_family_declares_is_refused_by_the_config_alone(s3: Door, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"architectures": ["Unknown"]}))
    url = s3.put("m", checkpoint)
    with pytest.raises(UnsupportedModelError, match=r"Unknown.*fallback=.transformers"):
        load(url, backend="cpu", tensor_parallel=2)
    assert fetched(s3) == {"config.json"}


def test_what_is_missing_is_told_as_ever(s3: Door, checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    url = s3.put("m", checkpoint)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(url, backend="cpu", tensor_parallel=2)
    with pytest.raises(CheckpointError, match="s3://models/none"):
        load("s3://models/none", backend="cpu", tensor_parallel=2)


def test_ranks_that_can_be_are_loaded(s3: Door, checkpoint: Path) -> None:
    url = s3.put("m", checkpoint)
    with load(url, backend="cpu", tensor_parallel=2) as model:
        assert model.generate([[1, 2]], max_new_tokens=1)[0].token_ids
    assert "model.safetensors" in fetched(s3)
