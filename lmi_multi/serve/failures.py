"""What keeps an engine from answering."""

from __future__ import annotations

from lmi_multi.errors import LmiError


class EngineGoneError(LmiError):
    """The engine process ended, or hung, while it was answering."""


class RefusedError(LmiError):
    """The engine found something wrong with a request that the server had let through."""


class OverloadedError(LmiError):
    """There is no room for another request now; try again in a second."""


class NotReadyError(LmiError):
    """There is no engine yet, or not yet again; try again in some seconds."""


class LateError(LmiError):
    """There was no whole answer in time."""


class UnreadError(LmiError):
    """The client takes its stream more slowly than the server may wait for."""
