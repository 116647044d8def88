"""The command line as a person and a script use it: output, exit codes, error lines."""

from __future__ import annotations

import inspect
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmi_multi.cli import main as entry
from lmi_multi.cli.app import app
from lmi_multi.cli.console import size
from lmi_multi.cli.generate import generate, parse_options
from lmi_multi.cli.main import run
from lmi_multi.errors import OptionError, RankError
from lmi_multi.options import GenerateOptions
from tests.families import FAMILIES

PROMPT = "the third of march nineteen ninety nine at half past six in the evening"
WRITTEN = "1999-03-03 18:30"
SUMMARY = re.compile(r"^\S.*: \d+ tokens in \d+\.\d\d s, \d+\.\d tokens/s$", re.MULTILINE)
COMMANDS = (
    "generate",
    "perplexity",
    "convert",
    "inspect",
    "plan",
    "bench",
    "cache",
    "doctor",
    "demo",
)


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Give this process a piped standard input."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 without a tokenizer."""
    folder = tmp_path_factory.mktemp("cli") / "gpt2"
    FAMILIES["gpt2"].save(folder)
    return folder


# Help, version, speed


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_reads_well(command: str) -> None:
    shown = CliRunner().invoke(app, [*command.split(), "--help"])
    assert shown.exit_code == 0
    assert "Usage:" in shown.output
    for name in COMMANDS if not command else ("--help",):
        assert name in shown.output


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    shown = capsys.readouterr()
    assert "Usage:" in shown.out
    assert shown.err == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert re.fullmatch(r"lmi-multi \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, time; from lmi_multi.cli.main import run; code = run(['generate', '--help']); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules); "
        # Of this process's own time: other processes may be using the machine.
        "assert time.process_time() < 5; sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


# Happy paths


def test_generate_prints_text_and_a_closing_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "demo", PROMPT, "twenty two dollars", "--backend", "cpu"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{WRITTEN}\n$22\n"
    assert SUMMARY.search(shown.err)
    assert shown.err.startswith("cpu")


def test_generate_json_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(monkeypatch, f"{PROMPT}\n\r\n  \ntwenty two dollars\r\n".encode())
    assert run(["generate", "demo", "--json", "--max-new-tokens", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == [PROMPT, "twenty two dollars"]
    assert lines[0]["text"] == WRITTEN[:3]
    assert lines[0]["finish_reason"] == "length"
    assert len(lines[0]["token_ids"]) == 3
    assert lines[0]["error"] is None


def test_json_has_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["-o", "num_beams=3", "-o", "num_return_sequences=2", "-o", "logprobs=1"]
    assert run(["generate", "demo", "ten dollars", "two", "--json", *asked]) == 0
    records = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert [record["prompt"] for record in records] == ["ten dollars"] * 2 + ["two"] * 2
    for best, second in (records[:2], records[2:]):
        assert best["score"] >= second["score"]
        for record in (best, second):
            tokens = [entry["token_id"] for entry in record["logprobs"]]
            assert tokens == record["token_ids"]
            total = sum(entry["logprob"] for entry in record["logprobs"])
            assert record["cumulative_logprob"] == pytest.approx(total)
            assert all(len(entry["top"]) == 1 for entry in record["logprobs"])
            assert "prompt_logprobs" not in record


def test_generate_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"\ufeff{PROMPT}\n", encoding="utf-8")
    assert run(["generate", "demo", "--file", str(file)]) == 0
    assert capsys.readouterr().out == f"{WRITTEN}\n"


def test_generate_with_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--max-new-tokens 6 --min-new-tokens 2 --do-sample --temperature 0.5 --top-k 5"
    more = "--top-p 0.9 --seed 7 --ignore-eos --dtype fp32 --max-batch 2 --max-tokens 128"
    args = ["generate", "demo", PROMPT, *options.split(), *more.split(), "--stop", "never"]
    shown = []
    for _ in range(2):
        assert run([*args, "--json"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert len(json.loads(shown[0])["token_ids"]) == 6


def test_common_options_have_flags_and_the_others_a_general_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = {"max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "seed", "stop"}
    assert common <= set(GenerateOptions.model_fields)
    assert common <= set(inspect.signature(generate).parameters)
    given = ["min_p=0.1", "bad-words=[[5, 6]]", "forced_eos_token_id=1"]
    assert parse_options(given) == {
        "min_p": 0.1,
        "bad_words": [[5, 6]],
        "forced_eos_token_id": 1,
    }
    assert run(["generate", "demo", "one", "-o", "min_q=1"]) == 2
    assert "did you mean 'min_p'" in capsys.readouterr().err
    assert run(["generate", "demo", "one", "-o", "min_p"]) == 2
    assert "'min_p' is not NAME=VALUE" in capsys.readouterr().err


def test_perplexity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.tsv", tmp_path / "bad.tsv"
    good.write_text("half past six in the evening\t18:30\ntwelve dollars\t$12\n")
    bad.write_text("half past six in the evening\t18:31\ntwelve dollars\t$13\n")
    values = []
    for file in (good, bad):
        assert run(["perplexity", "demo", "--file", str(file), "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["tokens"] == 8
        values.append(record["perplexity"])
    assert 1 <= values[0] < 1.01 < 2 < values[1]
    good.write_text("no tab here")
    assert run(["perplexity", "demo", "--file", str(good)]) == 2
    assert "one tab" in capsys.readouterr().err
    good.write_bytes(b"\xff\xfe")
    assert run(["perplexity", "demo", "--file", str(good)]) == 2
    assert "no UTF-8" in capsys.readouterr().err


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--prompt-tokens", "40", "--new-tokens", "5", "--rounds", "1"]
    assert run(["bench", "demo", "--batch", "1", "--batch", "3", *sizes, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["rows"] for record in found] == [1, 3]
    for record in found:
        assert record["whole"] == pytest.approx(record["first"] + 4 * record["step"])
        assert record["tokens_per_second"] == pytest.approx(1000 * record["rows"] / record["step"])
    assert run(["bench", "demo", "--batch", "2", *sizes]) == 0
    shown = capsys.readouterr().out
    assert "40 + 5 tokens" in shown and "2 rows" in shown
    assert run(["bench", "demo", "--batch", "0"]) == 2


def test_bench_with_options(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--batch", "2", "--prompt-tokens", "9", "--new-tokens", "4", "--rounds", "1"]
    sampled = ["-o", "do_sample=true", "-o", "top_p=0.9", "-o", "repetition_penalty=1.2"]
    assert run(["bench", "demo", *sizes, *sampled]) == 0
    assert "2 rows" in capsys.readouterr().out
    assert run(["bench", "demo", *sizes, *sampled, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["options"] == {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.2}
    for option, said in (
        ("suppress_tokens=[99999]", "suppress_tokens has the token id 99999; allowed: 0 to 319"),
        (f"suppress_tokens={list(range(320))}", "answers end early (numerical_error)"),
    ):
        assert run(["bench", "demo", *sizes, "-o", option]) == 2
        assert said in capsys.readouterr().err
    for option, said in (
        ("max_new_tokens=3", "max_new_tokens is given"),
        ("min_new_tokens=3", "min_new_tokens is given"),
        ("num_beam_groups=2", "num_beam_groups is given"),
        ("top_p=2", "top_p is 2"),
    ):
        assert run(["bench", "demo", *sizes, "-o", option]) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith(f"error: {said}") and not shown.out  # nothing was loaded


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_generate_quantized(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "demo", PROMPT, "--quantize", kind]) == 0
    assert capsys.readouterr().out == f"{WRITTEN}\n"


def test_a_share_of_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "demo", PROMPT, "--memory-share", "0.9"]) == 0
    assert capsys.readouterr().out == f"{WRITTEN}\n"
    assert run(["generate", "demo", PROMPT, "--memory-share", "90"]) == 2
    assert "memory_share is 90.0, must be None or a number above 0" in capsys.readouterr().err


def test_generate_with_token_ids(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", str(tiny), "--token-ids", "5, 6,7", "--token-ids", "8"]
    assert run([*args, "--max-new-tokens", "4", "--ignore-eos"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(re.fullmatch(r"\d+(,\d+){3}", line) for line in lines)
    assert run([*args, "--max-new-tokens", "4", "--ignore-eos", "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[0])
    assert record["prompt"] == record["prompt_token_ids"] == [5, 6, 7]
    assert record["text"] is None


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--count", "3", "--backend", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "prompt" in shown
    assert SUMMARY.search(shown)
    assert "\x1b" not in shown


def test_convert_then_inspect_then_generate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "artifact"
    assert run(["convert", "demo", str(target), "--quantize", "int8", "--dtype", "fp32"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{target}\n"
    assert "MiB" in shown.err
    assert run(["inspect", str(target), "--json", "--verify"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["family"], found["dtype"]) == ("artifact", "t5", "fp32")
    assert (found["quantize"], found["verified"]) == ("int8", "yes")
    assert found["parameters"] > 1_000_000
    assert run(["generate", str(target), PROMPT]) == 0
    assert capsys.readouterr().out == f"{WRITTEN}\n"


def test_inspect_shows_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = tmp_path / "a[bold]b:smile:"
    FAMILIES["gpt2"].save(odd)
    assert run(["inspect", str(odd)]) == 0
    page = capsys.readouterr().out
    for word in ("gpt2", "GPT2LMHeadModel", "model.safetensors", "parameters", str(odd)):
        assert word in page
    assert "\x1b" not in page


# Errors: one line, the right code


BAD = {
    "no such folder": (["generate", "./absent", "x"], 1, "./absent"),
    "no such model": (["inspect", "absent-model"], 1, "absent-model"),
    "a file": (["inspect", "FILE"], 1, "is a file"),
    "unknown backend": (["generate", "demo", "x", "--backend", "tpu"], 2, "tpu"),
    "bad dtype": (["generate", "demo", "x", "--dtype", "fp8"], 2, "fp8"),
    "bad quantize": (["convert", "demo", "TARGET", "--quantize", "int3"], 2, "int3"),
    "bad degree": (["generate", "demo", "x", "--tensor-parallel", "0"], 2, "tensor_parallel"),
    "bad top_k": (["generate", "demo", "x", "--top-k", "-3"], 2, "top_k is -3"),
    "bad temperature": (["generate", "./absent", "x", "--temperature", "-1"], 2, "temperature"),
    "contradiction": (["generate", "demo", "x", "--greedy", "--top-k", "3"], 2, "do_sample"),
    "not a number": (["generate", "demo", "x", "--seed", "x"], 2, "--seed"),
    "unknown option": (["generate", "demo", "--tempersture", "1"], 2, "--tempersture"),
    "unknown command": (["generat", "demo"], 2, "generat"),
    "missing argument": (["convert", "demo"], 2, "target"),
    "empty input": (["generate", "demo"], 2, "standard input is empty"),
    "no such file": (["generate", "demo", "--file", "ABSENT"], 2, "No such file"),
    "garbage file": (["generate", "demo", "--file", "GARBAGE"], 2, "line 2 is not UTF-8"),
    "two places": (["generate", "demo", "x", "--token-ids", "1"], 2, "one place"),
    "bad ids": (["generate", "demo", "--token-ids", "1,x"], 2, "1,x"),
    "negative id": (["generate", "demo", "--token-ids=-1"], 2, "negative"),
    "id too large": (["generate", "demo", "--token-ids", "99999"], 2, "99999"),
    "text without tokenizer": (["generate", "TINY", "x"], 2, "no tokenizer"),
    "target in use": (["convert", "demo", "USED"], 1, "USED"),
}


@pytest.mark.parametrize("name", BAD)
def test_error_is_one_line(
    name: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args, code, word = BAD[name]
    (tmp_path / "FILE").write_text("x")
    (tmp_path / "GARBAGE").write_bytes(b"fine\n\xff\xfe\x00\n")
    (tmp_path / "USED").mkdir()
    (tmp_path / "USED" / "precious").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    feed(monkeypatch, b"")
    assert run([str(tiny) if arg == "TINY" else arg for arg in args]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert word in shown.err


def test_a_terminal_is_not_waited_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(monkeypatch, b"")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert run(["generate", "demo"]) == 2
    assert "no prompt" in capsys.readouterr().err


def test_debug_shows_the_traceback_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["--debug", "inspect", "./absent"], ["inspect", "./absent", "--debug"]):
        assert run(args) == 1
        shown = capsys.readouterr().err
        assert shown.startswith("Traceback")
        assert shown.splitlines()[-1].startswith("error: ")


def test_debug_after_two_dashes_is_a_prompt() -> None:
    args = ["generate", "demo", "--debug", "--", "--debug"]
    assert entry.take_debug(args) == (["generate", "demo", "--", "--debug"], True)
    assert entry.take_debug(args[:2]) == (args[:2], False)


def test_errors_become_codes_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (OptionError("bad\nmore"), 2, "error: bad\n"),
        (RankError("rank 1 died\nTraceback ..."), 1, "error: rank 1 died\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (KeyError("x"), 1, "error: KeyError: 'x' (--debug shows where)\n"),
        (RuntimeError(), 1, "error: RuntimeError: RuntimeError (--debug shows where)\n"),
    ]
    for error, code, line in cases:
        assert entry.report(error, debug=False) == code
        assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**42, "4.0 TiB")]
)
def test_size_in_words(count: int, words: str) -> None:
    assert size(count) == words
