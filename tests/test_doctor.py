"""What `doctor` collects, part by part, and how it shows it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from lmi_multi.cli import report
from lmi_multi.cli.main import run


def test_json_has_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == set(report.Report.__annotations__)
    assert found["ok"] is True
    assert {state["name"] for state in found["backends"]} >= {"cpu", "cuda", "neuron"}
    assert found["memory"]["total"] >= found["memory"]["available"] > 0
    assert found["torch"]["error"] is None
    assert {cache["name"] for cache in found["caches"]} == {"artifacts", "hub"}


def test_every_missing_backend_has_a_reason_and_a_remedy() -> None:
    for state in report.backend_states():
        if not state["available"]:
            assert state["reason"]
            assert state["remedy"]
            assert "\n" not in state["reason"] + state["remedy"]


def test_page_has_no_escape_codes_and_cuts_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", "/a/folder[red]/" + "long/" * 20)
    assert run(["doctor"]) == 0
    page = capsys.readouterr().out
    assert "\x1b" not in page
    assert "/a/folder[red]/" + "long/" * 20 in page
    assert "cpu" in page


def test_a_broken_torch_is_reported_not_raised(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> object:
        raise OSError(f"lib{name}.so: cannot open shared object file\nmore")

    monkeypatch.setattr(report, "import_module", broken)
    assert report.torch_state()["error"] == ("OSError: libtorch.so: cannot open shared object file")
    assert run(["doctor"]) == 0
    assert "libtorch.so: cannot open" in capsys.readouterr().out


def test_exit_1_when_the_core_cannot_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[object]:
        raise ImportError("no torch here")

    monkeypatch.setattr("lmi_multi.backends.available", broken)
    assert run(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert found["backends"][0]["reason"] == "ImportError: no torch here"
    assert any(line.startswith("core: reinstall") for line in found["remedies"])


def test_secrets_are_not_shown() -> None:
    given = {"HF_TOKEN": "hf_abc", "HF_HUB_OFFLINE": "1", "NEURON_RT_NUM_CORES": "2", "HOME": "/x"}
    assert report.settings(given) == {
        "HF_HUB_OFFLINE": "1",
        "HF_TOKEN": "(set)",
        "NEURON_RT_NUM_CORES": "2",
    }


def test_folder_bytes_counts_a_file_with_two_names_once(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(b"x" * 1000)
    (tmp_path / "b").hardlink_to(tmp_path / "inner" / "a")
    assert report.folder_bytes(tmp_path) == 1000
    assert report.folder_bytes(tmp_path / "absent") == 0


def test_disk_free_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    free = report.disk_free(tmp_path / "not" / "yet")
    assert free is not None
    assert free > 0


def test_processor_name_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nmodel name\t: A Processor: fast\n")
    assert report.processor(file) == "A Processor: fast"
    assert report.processor(tmp_path / "absent")


def test_low_disk_and_memory_get_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "psutil.virtual_memory",
        lambda: SimpleNamespace(total=2**34, available=2**30),
    )
    state = {
        "backends": [],
        "caches": [report.Cache(name="artifacts", path="/c", bytes=0, free=2**30)],
        "memory": report.memory_state(),
    }
    lines = report.remedies(cast(report.Report, state))
    assert lines == [
        "disk of /c: 1.0 GiB free; remove files, or set LMI_MULTI_CACHE to a folder on a "
        "larger disk",
        "memory: 1.0 GiB available; end other programs",
    ]
