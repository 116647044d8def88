"""Where a server listens."""

from __future__ import annotations

import errno
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from lmi_multi.errors import LmiError
from lmi_multi.serve.listening import listen, shown
from tests.serve.running import serving

NAME = "both.example"
ADDRESSES = (
    (socket.AF_INET6, ("::1", 0, 0, 0)),
    (socket.AF_INET, ("127.0.0.1", 0)),
    (socket.AF_INET, ("192.0.2.1", 0)),  # for documentation: no machine has it
)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """NAME stands for ADDRESSES, each twice, as resolvers do."""
    real = socket.getaddrinfo

    def getaddrinfo(host: str, *arguments: Any, **keywords: Any) -> list[Any]:
        if host != NAME:
            return list(real(host, *arguments, **keywords))
        return [(family, socket.SOCK_STREAM, 6, "", place) for family, place in ADDRESSES * 2]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
@pytest.mark.usefixtures("resolved")
def test_every_address_of_a_name() -> None:
    with listen(NAME, 0) as listening:
        assert [one.getsockname()[0] for one in listening] == ["::1", "127.0.0.1"]
        [port] = {one.getsockname()[1] for one in listening}
        assert shown(listening, NAME) == f"{NAME} (::1, 127.0.0.1) port {port}"
        for address in ("::1", "127.0.0.1"):
            socket.create_connection((address, port), timeout=5).close()
    assert all(one.fileno() == -1 for one in listening)


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
@pytest.mark.usefixtures("resolved")
def test_a_port_that_is_taken_on_one_of_them() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LmiError, match=f"host {NAME} port {port} cannot be listened on: Addr"):
            listen(NAME, port).__enter__()
        # Nothing is left of what could be had.
        socket.create_server(("::1", port), family=socket.AF_INET6).close()


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
@pytest.mark.usefixtures("resolved")
def test_a_free_port_is_free_on_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that the first address gives may be taken on the second: another is asked for."""
    real, taken = socket.create_server, []

    def create_server(place: tuple[str, int], **keywords: Any) -> socket.socket:
        if place[0] == "127.0.0.1" and not taken:
            taken.append(place[1])
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return real(place, **keywords)

    monkeypatch.setattr(socket, "create_server", create_server)
    with listen(NAME, 0) as listening:
        assert [one.getsockname()[0] for one in listening] == ["::1", "127.0.0.1"]
        assert taken and len({one.getsockname()[1] for one in listening}) == 1


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_nothing_to_listen_at(host: str) -> None:
    with pytest.raises(LmiError, match=f"host {host} port 0 cannot be listened on"):
        listen(host, 0).__enter__()


def test_localhost(tmp_path: Path) -> None:
    """A real server, at whatever addresses the machine gives the name."""
    found = socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)
    addresses = {str(place[0]) for *_, place in found}
    with serving(tmp_path, "demo", "--host", "localhost") as server:
        server.wait_ready()
        for address in addresses:
            host = f"[{address}]" if ":" in address else address
            port = server.client.base_url.port
            assert httpx.get(f"http://{host}:{port}/ping", timeout=60).status_code == 200
    assert all(address in server.log.read_text() for address in addresses)
