"""The benchmarks that run anywhere, on tiny shapes: their figures belong together, and what they
leave behind says where it was measured, but not in which folders."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import lmi_multi
from benchmarks import generate, hollow, loading, memory, merge_steps, newcomers, page, perplexity
from benchmarks.random_model import check
from benchmarks.shapes import SHAPES
from lmi_multi.backends.memory import Device
from lmi_multi.models.spec import ModelSpec

TINY = ["tiny-t5", "tiny-gpt2"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line, of which pages tell."""
    monkeypatch.setattr(sys, "argv", ["x", "--rounds", "1"])


def written(folder: Path, name: str, *columns: str) -> dict[str, Any]:
    """The JSON that a benchmark wrote, once it and the page beside it have been looked at."""
    text = (folder / f"{name}.md").read_text()
    raw = (folder / f"{name}.json").read_text()
    for column in columns:
        assert f"| {column} |" in text
    found: dict[str, Any] = json.loads(raw)
    assert found["date"][:10] in text and found["versions"]["torch"] in text
    assert found["machine"]["processor"] in text and found["command"] in text
    for part in (str(folder), str(Path.home()), str(Path(__file__).parents[1])):
        assert part not in text and part not in raw
    return found


def test_a_command_does_not_say_where_results_go(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["x", "--shape", "a b", "--results", "/away", "--results=/away", "--rounds", "3"]
    monkeypatch.setattr(sys, "argv", given)
    assert page.command("benchmarks.x") == "python -m benchmarks.x --shape 'a b' --rounds 3"


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("quantize", [None, "int8", "fp8"])
def test_a_hollow_artifact_loads(tmp_path: Path, name: str, quantize: Any) -> None:
    artifact = hollow.hollow_artifact(name, "bf16", quantize, tmp_path)
    with lmi_multi.load(tmp_path, backend="cpu") as model:
        assert model.artifact.spec == artifact.spec
        assert [c.token_ids for c in model.generate([[5, 6]], max_new_tokens=3)] == [[0, 0, 0]]


def test_a_large_hollow_artifact_takes_no_room(tmp_path: Path) -> None:
    artifact = hollow.hollow_artifact("flan-t5-xxl", "bf16", None, tmp_path)
    assert artifact.tensor_bytes(0, 1) > 20 * 2**30
    assert sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir()) < 2**20


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    right: dict[str, Any] = {"device": "cpu", "shapes": TINY, "dtype": "bf16", "quantize": ""}
    assert check(**right, results=tmp_path) == ("bf16", None)
    for wrong, said in (
        ({"shapes": ["huge"]}, "--shape is 'huge'; allowed: t5-small"),
        ({"device": "tpu"}, "--device is 'tpu'; allowed: cpu, cuda"),
        ({"dtype": "bf32"}, "--dtype is 'bf32'; allowed: fp32, fp16, bf16"),
        ({"quantize": "int4"}, "--quantize is 'int4'; allowed: int8, fp8"),
        ({"results": tmp_path / "none"}, "--results is '.*none'; no such folder"),
        ({"longest": 1025}, "tiny-gpt2: 1025 tokens wanted, its positions end at 1024"),
    ):
        with pytest.raises(SystemExit, match=said):
            check(**{"results": tmp_path, **right, **wrong})


def test_generate(tmp_path: Path) -> None:
    sizes = {
        "prompt_tokens": 12,
        "new_tokens": 6,
        "step_tokens": 24,
        "idle_tokens": 64,
        "rounds": 3,
    }
    generate.main(shape=TINY, batch=[1, 3], results=tmp_path, **sizes)
    found = written(tmp_path, "cpu-generate", *TINY)
    cases = found["cases"]
    assert [(c["shape"], c["rows"]) for c in cases] == [(name, n) for name in TINY for n in (1, 3)]
    for case in cases:
        assert case["steps"] == (6 if case["shape"] == "tiny-t5" else 5)
        for kind in ("generate", "first", "prefill"):
            assert len(case[kind]) == 3 and all(ms > 0 for ms in case[kind])
        assert len(case["step"]) == 3  # differences, of few tokens: noise may make them negative


def test_the_ratios_of_generate() -> None:
    """Of each round, then their median."""
    case = generate.Case(
        *("t5", "bf16", 1, 11, 11),
        generate=[31.0, 90.0, 33.0], first=[10.0, 30.0, 10.0], step=[2.0, 6.0, 2.0],
        prefill=[8.0, 24.0, 8.0],
    )  # fmt: skip
    assert case.whole == pytest.approx(31 / 30) and case.parts == pytest.approx(31 / 30)


def test_generate_fails_above_what_is_required(tmp_path: Path) -> None:
    sizes = {"prompt_tokens": 4, "new_tokens": 3, "rounds": 1}
    with pytest.raises(SystemExit, match="`parts` is above -9999"):  # however noisy the machine is
        generate.main(shape=["tiny-t5"], batch=[1], require=-9999, results=tmp_path, **sizes)
    written(tmp_path, "cpu-generate", "tiny-t5")


def test_newcomers(tmp_path: Path) -> None:
    sizes = {"rows": 3, "prompt_tokens": 5, "newcomers": 2, "long": 90, "rounds": 2}
    newcomers.main(shape=TINY, step_tokens=[32, 256], results=tmp_path, **sizes)
    found = written(tmp_path, "cpu-newcomers", *TINY)
    steps = {(c["shape"], c["step_tokens"]): c["steps"] for c in found["cases"]}
    # An encoder's prompts come one a step, or together.
    assert steps[("tiny-t5", 32)] == 2 and steps[("tiny-t5", 256)] == 1
    # Slices of 29 tokens beside three rows, then of 28, and a few tokens of both prompts.
    assert steps[("tiny-gpt2", 32)] in (7, 8) and steps[("tiny-gpt2", 256)] == 1
    for case in found["cases"]:
        assert 0 < case["alone"] <= case["alone_worst"]
        assert 0 < case["beside"] <= case["beside_worst"]
        assert case["bound"] == case["alone"] + case["slice"]


def test_steps_are_merged_into_their_page(tmp_path: Path) -> None:
    """What was measured anew takes the old one's place; a peer of another commit is marked."""

    def entry(who: str, rows: int, step: float) -> dict[str, Any]:
        facts = {"shape": "flan-t5-base", "dtype": "bf16", "roofline": 0.1, "first": 1.25}
        return facts | {"who": who, "rows": rows, "step": step}

    old = {"commit": "aaa", "date": "2026-01-01"}
    before = [entry(who, 1, step) | old for who, step in (("lmi_multi", 4), ("CTranslate2", 2))]
    made = [entry("lmi_multi", 1, 0.5), entry("torch, graphed", 1, 1), entry("lmi_multi", 4, 1)]
    page, figures, new = (tmp_path / n for n in ("cuda-steps.md", "cuda-steps.json", "new.json"))
    page.write_text(f"before\n{merge_steps.BEGIN}old\n{merge_steps.END}after\n")
    figures.write_text(json.dumps({"machine": "some", "entries": before}))
    new.write_text(json.dumps({"bandwidth": 4e12, "entries": made}))
    merge_steps.main([new], "bbb", "2026-02-02", tmp_path)
    first, *lines, last = page.read_text().splitlines()
    assert (first, last) == ("before", "after")
    assert [line.removeprefix("| flan-t5-base | bf16 | ") for line in lines[3:-1]] == [
        "1 | 0.500 | 1.00 (2.00x) | 2.00 (4.00x)* |  | 0.10 | 20% | 1.2 | bbb |",
        "4 | 1.000 |  |  |  | 0.10 | 10% | 1.2 | bbb |",
    ]
    written = json.loads(figures.read_text())
    assert written["machine"] == "some" and len(written["entries"]) == 4
    assert {e["bandwidth"] for e in written["entries"] if e["commit"] == "bbb"} == {4e12}


def test_loading_says_what_is_wrong_before_it_writes_a_file(tmp_path: Path) -> None:
    for options, said in (
        ({"shape": ["nix"]}, "--shape is 'nix'; allowed: "),
        ({"results": tmp_path / "nix"}, "--results is .*; no such folder"),
    ):
        with pytest.raises(SystemExit, match=said):
            loading.main(**{"gib": 1, "shape": ["tiny-t5"], "results": tmp_path, **options})
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="cuda: "):
            loading.main(gib=1, shape=["tiny-t5"], results=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_page_of_loading() -> None:
    copy, ready = (
        loading.Rate(*own)
        for own in (("copy", 10**9, 0.03, 0.02), ("gpt-j-6b ready", 12 * 10**9, 2, 0.4))
    )
    text = loading._page("command", [copy, ready])
    assert (
        "| copy | 0.030 | 0.020 | 50.0 | 100% |\n| gpt-j-6b ready | 2.000 | 0.400 | 30.0 | 60% |"
        in text
    )


def test_steps_must_have_room_for_newcomers(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--step-tokens is 20; allowed: above rows and newcomers"):
        newcomers.main(shape=TINY, step_tokens=[64, 20], results=tmp_path)


@pytest.mark.parametrize(
    ("kind", "expected"), [("decoder", [30, 30, 25]), ("encoder-decoder", [30, 30])]
)
def test_a_full_slice(kind: str, expected: list[int]) -> None:
    [spec, _] = hollow.outline(SHAPES["tiny-gpt2" if kind == "decoder" else "tiny-t5"])
    assert isinstance(spec, ModelSpec) and spec.kind == kind
    load = newcomers.Load(rows=3, prompt=5, newcomers=4, long=30)
    assert load.slice(spec, 88) == expected
    assert load.slice(spec, 20) == ([17] if kind == "decoder" else [30])


def test_perplexity_loads_each_format_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats, loads = (("fp32", None), ("bf16", "int8")), []
    load = lmi_multi.load

    def counted(source: Any, **given: Any) -> Any:
        loads.append((source, given["dtype"], given["quantize"]))
        return load(source, **given)

    monkeypatch.setattr(lmi_multi, "load", counted)
    texts: Mapping[str, Any] = {"whole": perplexity.demo(2), "gaps": perplexity.demo(2, 5)}
    found = list(perplexity.compare(texts, "cpu", formats))
    assert loads == [("demo", *form) for form in formats]
    assert [(e.model, e.dtype, e.quantize) for e in found] == [
        (name, *form) for form in formats for name in texts
    ]
    assert [e.relative for e in found[:2]] == [0.0, 0.0] and found[3].drift


class FakeMeter:
    """A GPU of 8 GiB, of which more is taken every time it is asked."""

    def __init__(self) -> None:
        self.free = 8 * 2**30

    def device(self) -> Device:
        now, self.free = self.free, self.free - 2**30
        return Device("cuda:0", 8 * 2**30, now)

    def allocated(self) -> int:
        return 5

    def peak(self) -> int:
        return 7 * 2**30


def test_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load = lmi_multi.load

    def logged(*given: Any, **named: Any) -> Any:
        logging.getLogger("lmi_multi.backends.cuda.backend").info("weights %s", "0.5 GiB")
        return load(*given, **named)

    monkeypatch.setattr(lmi_multi, "load", logged)
    case = memory.measure("tiny-t5", "bf16", None, "cpu", 2, 40, FakeMeter())
    artifact = hollow.hollow_artifact("tiny-t5", "bf16", None, tmp_path)
    assert case.weights == artifact.tensor_bytes(0, 1) and case.said == "weights 0.5 GiB"
    # Blocks of 16 tokens of two layers' keys and values, four heads of 16 each, in two bytes.
    assert case.blocks == 2 * (3 + 3) and case.cache == case.blocks * 16 * 2 * 2 * 64 * 2
    assert [case.loaded, case.graphs, case.kept] == [2**30, 2 * 2**30, 3 * 2**30]
    assert case.allocated == 5 and case.workspace > 2**28
    assert case.spare == case.workspace - (7 * 2**30 - case.weights - case.cache)
    text = memory._page("x", [case])
    assert "| tiny-t5 | bf16 | 2 x 40 | 0.00 | 0.00 |" in text and "0.5 GiB" in text


def test_memory_on_a_cpu_is_only_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory.main(shape=["tiny-gpt2"], max_batch=2, max_tokens=24, results=tmp_path)
    assert "there is no plan of a workspace to compare" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
