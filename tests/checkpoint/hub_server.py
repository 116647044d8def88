"""A stand-in for the Hugging Face Hub on 127.0.0.1: the routes that a snapshot download uses."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Hub:
    """`repos` maps a name to its revisions (a commit or a branch that names one) and files.

    `requests` are the paths that were asked for, `sent` the bytes of each file that were sent.
    """

    repos: dict[str, dict[str, str | Files]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    url: str = ""

    def find(self, repo: str, revision: str) -> tuple[str, Files] | None:
        """The commit and its files."""
        found = self.repos[repo].get(revision)
        if isinstance(found, str):
            return self.find(repo, found)
        return None if found is None else (revision, found)


def _answer(hub: Hub, path: str) -> tuple[int, dict[str, str], bytes]:
    parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
    if parts[:2] == ["api", "models"]:
        repo, rest = "/".join(parts[2:4]), parts[4:]
    else:
        repo, rest = "/".join(parts[:2]), parts[2:]
    if repo not in hub.repos:
        return 404, {"X-Error-Code": "RepoNotFound"}, b""
    if repo in hub.gated:
        return 403, {"X-Error-Code": "GatedRepo"}, b""
    found = hub.find(repo, rest[1] if len(rest) > 1 else "main")
    if found is None:
        return 404, {"X-Error-Code": "RevisionNotFound"}, b""
    commit, files = found
    if rest[:1] == ["resolve"]:
        return _file(commit, files, "/".join(rest[2:]))
    if rest[:1] == ["tree"]:
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
            for name, data in files.items()
        ]
        return 200, {}, json.dumps(entries).encode()
    siblings = [{"rfilename": name} for name in files]
    return 200, {}, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode()


def _file(commit: str, files: Files, name: str) -> tuple[int, dict[str, str], bytes]:
    if name not in files:
        return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
    headers = {"ETag": f'"{_etag(files[name])}"', "X-Repo-Commit": commit}
    return 200, headers, files[name]


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    """Run the stand-in on a free port."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.requests.append(self.path)
            status, headers, body = _answer(hub, self.path)
            asked = self.headers.get("Range", "").removeprefix("bytes=").split("-")
            if status == 200 and "ETag" in headers and len(asked) == 2:
                total, start, last = len(body), int(asked[0]), int(asked[1])
                status, body = 206, body[start : last + 1]
                headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{total}"
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                name = self.path.rsplit("/", 1)[-1]
                hub.sent[name] = hub.sent.get(name, 0) + len(body)
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 (the name that http.server looks for)

        def log_message(self, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
