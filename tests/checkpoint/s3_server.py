"""S3 on 127.0.0.1: moto's server, and before it a door that counts requests and injects faults."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

BUCKET = "models"
SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate</Message></Error>"
)
_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length", "date", "server"}


@dataclass(frozen=True)
class Request:
    """What a client asked for; `range` and `if_match` as in the headers."""

    method: str
    path: str
    query: str
    range: str | None
    if_match: str | None

    @property
    def is_data(self) -> bool:
        """Whether it reads an object."""
        return self.method == "GET" and self.path.count("/") > 1 and "list-type" not in self.query

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rsplit("/", 1)[-1]


@dataclass
class Fault:
    """Answer `status` with `body` instead; or cut the real answer after `cut` bytes."""

    status: int = 0
    body: bytes = SLOW_DOWN
    cut: int | None = None


@dataclass
class Door:
    """What went through, and what is to go wrong: `fault` is asked about every request."""

    url: str
    client: Any
    requests: list[Request] = field(default_factory=list)
    fault: Callable[[Request], Fault | None] = lambda request: None

    @property
    def data(self) -> list[Request]:
        """The requests that read objects."""
        return [request for request in self.requests if request.is_data]

    def put(self, prefix: str, folder: Path) -> str:
        """Copy a folder to S3, and forget the requests; returns its address."""
        for path in folder.iterdir():
            self.client.put_object(
                Bucket=BUCKET, Key=f"{prefix}/{path.name}", Body=path.read_bytes()
            )
        self.requests.clear()
        return f"s3://{BUCKET}/{prefix}"

    def keys(self, prefix: str) -> set[str]:
        """The names of the objects below a prefix."""
        page = self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/")
        return {entry["Key"].removeprefix(f"{prefix}/") for entry in page.get("Contents", ())}


def names(folder: Path) -> set[str]:
    """The names of a folder's files."""
    return {path.name for path in folder.iterdir()}


@contextmanager
def serve(upstream: tuple[str, int], client: Any) -> Iterator[Door]:
    """Run a door before the server at `upstream`; `client` talks to the server directly."""
    door = Door("", client)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            parts = urlsplit(self.path)
            request = Request(
                self.command,
                unquote(parts.path),
                parts.query,
                self.headers.get("Range"),
                self.headers.get("If-Match"),
            )
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            door.requests.append(request)
            fault = door.fault(request) or Fault()
            if fault.status:
                self._send(fault.status, [("Content-Type", "application/xml")], fault.body, None)
                return
            link = http.client.HTTPConnection(*upstream, timeout=30)
            link.request(self.command, self.path, body, dict(self.headers))
            answer = link.getresponse()
            data = answer.read()
            self._send(answer.status, answer.getheaders(), data, fault.cut)
            link.close()

        def _send(
            self, status: int, headers: list[tuple[str, str]], data: bytes, cut: int | None
        ) -> None:
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in _HOP:
                    self.send_header(name, value)
            length = dict(headers).get("Content-Length", len(data)) if not data else len(data)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            try:
                if self.command != "HEAD":
                    self.wfile.write(data[:cut])
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            if cut is not None:
                self.close_connection = True

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer  # noqa: N815

        def log_message(self, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    door.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield door
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
