"""An engine whose server was killed ends by itself, with all that it has started."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from lmi_multi.serve.worker import PATIENCE
from tests.serve.running import LONG, ROOM, Running, serving

STUCK = """
import subprocess, sys
from djl_python import Input, Output

def handle(inputs: Input):
    if inputs.is_empty():
        return None
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open("stuck", "w").close()
    while True:
        pass
"""


def kill_and_count(server: Running) -> None:
    """Kill the server; whatever it and its engine have started must end soon after."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert len(family) >= 2
    server.process.send_signal(signal.SIGKILL)
    _, left = psutil.wait_procs(family, timeout=PATIENCE + 20)
    for process in left:
        process.kill()
    assert not left


def test_a_script_that_is_stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "model.py"
    script.write_text(STUCK)
    monkeypatch.chdir(tmp_path)  # where the script leaves its mark
    with serving(tmp_path, "demo", "--entry-point", str(script)) as server:
        server.wait_ready()
        with server.asking("/invocations", {"inputs": "a"}):
            server.until((tmp_path / "stuck").exists)
            kill_and_count(server)


def test_ranks_that_are_in_a_step(tmp_path: Path) -> None:
    with serving(tmp_path, "demo", "--tensor-parallel", "2", "--backend", "cpu", ROOM) as server:
        server.wait_ready()
        with server.asking("/invocations", LONG):
            server.until(lambda: server.gauge("lmi_batch_rows") == 1)
            kill_and_count(server)
