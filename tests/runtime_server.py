"""A stand-in for SageMaker's runtime on 127.0.0.1: it passes invocations on to a server of ours,
and wraps streams in AWS's event stream encoding, as SageMaker does."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from zlib import crc32

import httpx

LIMIT = 7  # bytes of a part: lines of a stream are cut anywhere


@dataclass
class Runtime:
    """`endpoints` maps names to the addresses of their containers.

    `headers` are those of the requests that came; `cut` ends a stream after so many parts, and
    `fault` is what it then says.
    """

    url: str = ""
    endpoints: dict[str, str] = field(default_factory=dict)
    headers: list[dict[str, str]] = field(default_factory=list)
    cut: int | None = None
    fault: bytes | None = None


def message(kind: str, payload: bytes, event: bool = True) -> bytes:
    """One message of an event stream: lengths, their checksum, headers, payload, checksum."""
    headers = {":message-type": "event" if event else "exception"}
    headers[":event-type" if event else ":exception-type"] = kind
    packed = b"".join(
        struct.pack("!B", len(n)) + n.encode() + struct.pack("!BH", 7, len(v)) + v.encode()
        for n, v in headers.items()
    )
    prelude = struct.pack("!II", 16 + len(packed) + len(payload), len(packed))
    start = prelude + struct.pack("!I", crc32(prelude)) + packed + payload
    return start + struct.pack("!I", crc32(start))


@contextmanager
def serve() -> Iterator[Runtime]:
    """Run the stand-in on a free port."""
    runtime = Runtime()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            runtime.headers.append(dict(self.headers))
            body = self.rfile.read(int(self.headers["Content-Length"]))
            _, _, name, action = self.path.split("/")
            if name not in runtime.endpoints:
                said = {"message": f"Endpoint {name} of account 123456789012 not found."}
                self.reply(400, json.dumps(said).encode(), {"x-amzn-ErrorType": "ValidationError"})
                return
            streams = action == "invocations-response-stream"
            accept = self.headers["X-Amzn-SageMaker-Accept" if streams else "Accept"]
            # Of the headers only these reach a container.
            sent = {"Content-Type": self.headers["Content-Type"], "Accept": accept}
            address = f"{runtime.endpoints[name]}/invocations"
            with httpx.stream("POST", address, content=body, headers=sent, timeout=60) as answer:
                if answer.status_code >= 400:
                    answer.read()
                    self.fail(answer)
                elif streams:
                    self.pass_stream(answer)
                else:
                    data = answer.read()
                    self.reply(200, data, {"Content-Type": answer.headers["Content-Type"]})

        def fail(self, answer: httpx.Response) -> None:
            said = {
                "Message": "Received an error from primary.",
                "OriginalStatusCode": answer.status_code,
                "OriginalMessage": answer.text,
            }
            self.reply(424, json.dumps(said).encode(), {"x-amzn-ErrorType": "ModelError"})

        def pass_stream(self, answer: httpx.Response) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/vnd.amazon.eventstream")
            self.end_headers()
            for number, part in enumerate(answer.iter_bytes(LIMIT)):
                if number == runtime.cut:
                    if runtime.fault is not None:
                        self.wfile.write(message("ModelStreamError", runtime.fault, event=False))
                    return
                self.wfile.write(message("PayloadPart", part))
                self.wfile.flush()

        def reply(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for header, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    runtime.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield runtime
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
