"""Servers in processes of their own, on ports of loopback."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

# A minute's worth of tokens, if nobody ends it: whoever waits for something of it may be late. Only
# a server with this option has room for it.
LENGTH = 15_000
LONG: dict[str, Any] = {
    "inputs": "ten",
    "parameters": {"max_new_tokens": LENGTH, "ignore_eos": True, "min_new_tokens": LENGTH},
}
ROOM = "--max-tokens=16384"

# uvicorn closes a connection after five idle seconds: a request must not meet that on its way.
LIMITS = httpx.Limits(keepalive_expiry=1)


MODULE = (sys.executable, "-m", "lmi_multi")


@dataclass
class Running:
    """A server, and a client that talks to it."""

    process: subprocess.Popen[str]
    client: httpx.Client
    log: Path

    def post(self, path: str, body: Any, **keywords: Any) -> httpx.Response:
        return self.client.post(path, json=body, **keywords)

    def gauge(self, name: str) -> float:
        """One value of `/metrics`, labels included in its name; 0 while it is not there."""
        lines = self.client.get("/metrics").text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return float(values.get(name, 0.0))

    def wait_ready(self, seconds: float = 240) -> None:
        self.until(lambda: self.ping() == 200, seconds)

    def ping(self) -> int:
        try:
            return self.client.get("/ping").status_code
        except httpx.TransportError:
            return 0

    def until(self, condition: Any, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    @contextlib.contextmanager
    def asking(self, path: str, body: Any) -> Iterator[socket.socket]:
        """A request on a socket of its own, which is closed in the end, answered or not."""
        data = json.dumps(body, separators=(",", ":")).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: {len(data)}\r\n\r\n"
        address = self.client.base_url.host, self.client.base_url.port or 0
        with socket.create_connection(address, timeout=120) as connection:
            connection.sendall(head.encode() + data)
            yield connection

    def engine(self) -> psutil.Process:
        """The engine process."""
        children = psutil.Process(self.process.pid).children()
        [found] = [c for c in children if "lmi_multi.serve.worker" in c.cmdline()]
        return found

    @contextlib.contextmanager
    def standing(self, *engines: psutil.Process) -> Iterator[None]:
        """Its engines, or these, stand still meanwhile: what comes stays unanswered."""
        stopped = engines or (self.engine(),)
        for engine in stopped:
            engine.suspend()
        try:
            yield
        finally:
            for engine in stopped:
                with contextlib.suppress(psutil.NoSuchProcess):
                    engine.resume()

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        self.process.send_signal(number)
        return self.process.wait(seconds)


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port of loopback that nobody else is given meanwhile: it is bound and not listened on, so
    that a server can."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


@contextlib.contextmanager
def silent_collector(seconds: int) -> Iterator[dict[str, str]]:
    """One of traces that takes them and never answers: the environment of a server that waits for
    so long for it to."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "OTEL_EXPORTER_OTLP_TIMEOUT": str(seconds),
        }


@contextlib.contextmanager
def serving(
    folder: Path, model: str | None, *options: str, run: Sequence[str] = MODULE, **environ: str
) -> Iterator[Running]:
    """`lmi-multi serve MODEL`, by the command `run`; not ready yet. Whatever is left of it is ended
    in the end."""
    command = [*run, "serve", *([] if model is None else [model]), *options]
    log = folder / "server.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
    with contextlib.ExitStack() as stack:
        port = environ.get("SAGEMAKER_BIND_TO_PORT")
        if port is None:
            port = str(stack.enter_context(reserved_port()))
            command += ["--port", port]
        url = f"http://127.0.0.1:{port}"
        output = stack.enter_context(log.open("w"))
        client = stack.enter_context(httpx.Client(base_url=url, timeout=120, limits=LIMITS))
        process = stack.enter_context(
            subprocess.Popen(command, stdout=output, stderr=output, text=True, env=environment)
        )
        try:
            yield Running(process, client, log)
        finally:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
                process.kill()
