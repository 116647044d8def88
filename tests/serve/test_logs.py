"""Logs as JSON."""

from __future__ import annotations

import json
import logging
import signal
import sys
from pathlib import Path

from lmi_multi.serve.logs import JsonFormatter
from tests.serve.running import serving


def test_a_record_is_one_line() -> None:
    try:
        raise ValueError("a\nb")
    except ValueError:
        about = sys.exc_info()
    record = logging.LogRecord("a.b", logging.ERROR, "x.py", 1, "über %s\n", ("c",), about)
    [line] = JsonFormatter().format(record).splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["logger"], entry["message"]) == ("ERROR", "a.b", "über c\n")
    assert entry["traceback"].endswith("ValueError: a\nb")
    assert entry["time"].endswith("+00:00")


def test_a_server_that_logs_json(tmp_path: Path) -> None:
    """Also of a script that fails in the engine's process."""
    script = tmp_path / "model.py"
    script.write_text(
        "import logging\n"
        "def handle(inputs):\n"
        "    logging.warning('the script\\nspeaks')\n"
        "    return None\n"
    )
    options = ("--entry-point", str(script), "--log-format=json")
    with serving(tmp_path, "demo", *options) as server:
        server.wait_ready()
        assert server.stop(signal.SIGTERM) == 0
        lines = server.log.read_text().splitlines()
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    assert [line for line in lines if not line.startswith("{")] == [
        f"serving {script} on 127.0.0.1 port {server.client.base_url.port}"
    ]
    said = {entry["message"]: entry for entry in entries}
    assert said["the script\nspeaks"]["process"] != said["Shutting down"]["process"]
