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


@dataclass
class HttpError(Exception):
    """An answer that is no success. `param` is the field of the request that is to blame."""

    status: int
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: LmiError) -> HttpError:
        """A failure inside as the answer that its caller should get."""
        if isinstance(error, OverloadedError):
            return cls(503, str(error), headers={"Retry-After": "1"})
        if isinstance(error, NotReadyError):
            return cls(503, str(error), headers={"Retry-After": "5"})
        if isinstance(error, EngineGoneError):
            return cls(503, f"the engine is not available: {error}", headers={"Retry-After": "5"})
        if isinstance(error, LateError):
            return cls(504, str(error))
        if isinstance(error, UnreadError):
            return cls(408, str(error))
        if isinstance(error, OptionError):
            return cls(400, str(error), error.option)
        if isinstance(error, RefusedError):
            return cls(400, str(error))
        if isinstance(error, CapacityError):
            return cls(507, str(error))
        return cls(500, str(error))

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
