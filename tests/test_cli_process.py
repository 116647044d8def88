"""The command as a process: its streams, its exit codes, Ctrl-C, and a reader that leaves."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from lmi_multi.cli import main as entry
from tests.test_cli import PROMPT, SUMMARY, WRITTEN

COMMAND = [sys.executable, "-m", "lmi_multi"]


def call(args: Sequence[str], stdin: str | bytes | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, piped."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run([*COMMAND, *args], input=data or b"", capture_output=True, timeout=240)
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def test_process_separates_results_from_the_rest() -> None:
    done = call(["generate", "demo"], PROMPT)
    assert (done.returncode, done.stdout) == (0, f"{WRITTEN}\n")
    assert SUMMARY.search(done.stderr)
    assert "\x1b" not in done.stdout + done.stderr


def test_process_exit_codes() -> None:
    assert call(["inspect", "./absent"]).returncode == 1
    garbage = call(["generate", "demo"], b"\x80\x81\n" * 100)
    assert (garbage.returncode, garbage.stdout) == (2, "")
    assert garbage.stderr == "error: standard input: line 1 is not UTF-8 text\n"


def test_interrupt_is_one_line_and_130() -> None:
    # More work than can end before the signal comes; the open pipe is read to its end first.
    args = [*COMMAND, "generate", "demo", "--max-new-tokens", "400", "--ignore-eos"]
    process = subprocess.Popen(
        [*args, *[PROMPT] * 200],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        wait_for_module(process, "torch")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert (out, err) == (b"", b"interrupted\n")


INTERRUPTED = """
from lmi_multi.cli import app, main

def invoke(args):
    exec("raise KeyboardInterrupt")

app.invoke = invoke
main.main()
"""


def test_an_interrupt_in_executed_text_is_130_too(tmp_path: Path) -> None:
    """As in a dataclass that is being imported: Python would end by the signal itself."""
    (tmp_path / "own.py").write_text(INTERRUPTED)
    command = [sys.executable, "-m", "own"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"interrupted\n")


def wait_for_module(process: subprocess.Popen[bytes], name: str) -> None:
    """Wait until a library of that name is mapped by the process, then a little longer."""
    maps = Path(f"/proc/{process.pid}/maps")
    for _ in range(1200):
        assert process.poll() is None
        if f"/{name}/" in maps.read_text():
            time.sleep(3)
            return
        time.sleep(0.1)
    pytest.fail(f"{name} was not loaded within two minutes")


def test_interrupt_while_waiting_for_input() -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", "demo"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        wait_for_read(process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, b"", b"interrupted\n")


def wait_for_read(process: subprocess.Popen[bytes]) -> None:
    """Wait until the process sits in a read of its standard input, as the kernel tells it."""
    read = {"x86_64": "0", "aarch64": "63"}[platform.machine()]
    for _ in range(1200):
        assert process.poll() is None
        if Path(f"/proc/{process.pid}/syscall").read_text().startswith(f"{read} 0x0 "):
            return
        time.sleep(0.1)
    pytest.fail("it did not read its input within two minutes")


@pytest.mark.parametrize("args", [["doctor", "--json"], ["inspect", "demo"], ["--help"]])
def test_a_reader_that_leaves_is_no_error(args: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [*COMMAND, *args],
            stdout=write,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            timeout=120,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (entry.PIPE_CLOSED, b"")
