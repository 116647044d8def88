"""What the cache holds, and its removal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmi_multi.checkpoint import stored
from lmi_multi.checkpoint.cache import open_or_convert
from lmi_multi.checkpoint.files import cache_dir
from lmi_multi.checkpoint.s3.address import Address
from lmi_multi.checkpoint.s3.download import download
from lmi_multi.cli.main import run
from lmi_multi.errors import CheckpointError

from .s3_server import BUCKET, Door


def test_downloads_and_artifacts_come_and_go(
    s3: Door, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["cache"]) == 0 and "holds nothing" in capsys.readouterr().out
    url = s3.put("m", checkpoint)
    old = download(Address.parse(url))
    artifact = open_or_convert(url)
    s3.client.put_object(Bucket=BUCKET, Key="m/tokenizer.json", Body=b"{}")
    new = download(Address.parse(url))
    assert run(["cache", "--json"]) == 0
    found = {entry["name"]: entry["nbytes"] for entry in json.loads(capsys.readouterr().out)}
    folders = (old.folder, new.folder, artifact.folder)
    assert found == {
        path.relative_to(cache_dir()).as_posix(): sum(p.stat().st_size for p in path.iterdir())
        for path in folders
    }
    first, second, last = (path.relative_to(cache_dir()).as_posix() for path in folders)
    assert run(["cache", "--remove", first, "--remove", last]) == 0
    assert f"removed {first}" in capsys.readouterr().err
    assert [entry.name for entry in stored.entries()] == [second]
    assert stored.remove(second) > 0
    assert not new.folder.parent.exists() and stored.entries() == []
    assert download(Address.parse(url)) == new  # it comes again


@pytest.mark.parametrize("name", ["", "s3", "artifacts", "s3/../../x", "/etc", "artifacts/none"])
def test_only_what_is_listed_is_removed(cache: Path, name: str) -> None:
    (cache / "artifacts").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"the cache .* holds no"):
        stored.remove(name)
    assert run(["cache", "--remove", name]) == 1
    assert (cache / "artifacts").is_dir()
