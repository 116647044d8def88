"""What goes wrong in a request, as HTTP statuses."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmi_multi.errors import CapacityError, LmiError, OptionError
from lmi_multi.serve.failures import (
    EngineGoneError,
    LateError,
    NotReadyError,
    OverloadedError,
    RefusedError,
    UnreadError,
)

_KINDS = {
    400: "bad_request",
    401: "unauthorized",
    404: "not_found",
    405: "not_found",
    408: "slow_body",
    409: "conflict",
    413: "too_large",
    424: "script_failed",
    499: "client_gone",
    503: "unavailable",
    504: "late",
    507: "no_memory",
}


@dataclass
class HttpError(Exception):
    """An answer that is no success. `param` is the field of the request that is to blame; `kind` a
    word for the log, by default the status's."""

    status: int
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = ""

    def __post_init__(self) -> None:
        self.kind = self.kind or _KINDS.get(self.status, "failed")

    @classmethod
    def of(cls, error: LmiError) -> HttpError:
        """A failure inside as the answer that its caller should get."""
        message = str(error)
        if isinstance(error, OverloadedError):
            return cls(503, message, headers={"Retry-After": "1"}, kind="overloaded")
        if isinstance(error, NotReadyError):
            return cls(503, message, headers={"Retry-After": "5"}, kind="not_ready")
        if isinstance(error, EngineGoneError):
            message = f"the engine is not available: {message}"
            return cls(503, message, headers={"Retry-After": "5"}, kind="engine_gone")
        if isinstance(error, LateError):
            return cls(504, message)
        if isinstance(error, UnreadError):
            return cls(408, message, kind="unread")
        if isinstance(error, OptionError):
            return cls(400, message, error.option)
        if isinstance(error, RefusedError):
            return cls(400, message)
        if isinstance(error, CapacityError):
            return cls(507, message)
        return cls(500, message)

    def openai(self) -> dict[str, object]:
        """The body that OpenAI's clients understand."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.status,
            }
        }

    def plain(self) -> dict[str, object]:
        """The body that DJL Serving's clients know."""
        return {"error": self.message, "code": self.status}
