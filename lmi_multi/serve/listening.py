"""The sockets that a server listens on."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
from collections.abc import Iterator

from lmi_multi.errors import LmiError

BACKLOG = 2048  # connections that wait to be accepted
_TRIES = 20  # for a port that is free on every address of a name
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # what a name may stand for and a host may lack

log = logging.getLogger(__name__)


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Sockets that listen there, closed in the end: one for each address that `host` stands for and
    that this machine has, so that `localhost` is 127.0.0.1 and ::1. Port 0: one that is free, the
    same on all of them. Raises LmiError.
    """
    try:
        found = _all(host, port)
    except OSError as error:
        reason = error.strerror or error
        raise LmiError(f"host {host} port {port} cannot be listened on: {reason}") from None
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(one) for one in found]


def shown(listening: list[socket.socket], host: str) -> str:
    """Where that is, for people: the host, and its addresses where it is a name."""
    addresses = [one.getsockname()[0] for one in listening]
    place = host if addresses == [host] else f"{host} ({', '.join(addresses)})"
    return f"{place} port {listening[0].getsockname()[1]}"


def _all(host: str, port: int) -> list[socket.socket]:
    for _ in range(_TRIES - 1):
        try:
            return _each(host, port)
        except OSError as error:
            if port or error.errno != errno.EADDRINUSE:
                raise
            # What was free on the first address is somebody's on another: ask for a new one.
    return _each(host, port)


def _each(host: str, port: int) -> list[socket.socket]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = dict.fromkeys((family, place[0]) for family, _, _, _, place in found)
    listening: list[socket.socket] = []
    absent: OSError | None = None
    try:
        for family, address in addresses:
            try:
                listening.append(_one(family, str(address), port))
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                absent = error
                log.info("%s is %s, which this machine does not have", host, address)
                continue
            port = listening[0].getsockname()[1]
        if not listening and absent is not None:
            raise absent
        return listening
    except OSError:
        for one in listening:
            one.close()
        raise


def _one(family: int, address: str, port: int) -> socket.socket:
    return socket.create_server((address, port), family=family, backlog=BACKLOG)
