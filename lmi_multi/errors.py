"""Every error that lmi_multi raises on purpose: one line: what is wrong, and what is allowed."""

from __future__ import annotations


class LmiError(Exception):
    """Base of all errors of this package. `str(error)` is one clear line for the user."""


class OptionError(LmiError, ValueError):
    """A generation option, load argument or prompt is invalid; `option` names it where one is to
    blame, as the message does first."""

    def __init__(self, message: str, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option


class CheckpointError(LmiError):
    """A checkpoint or artifact is missing, malformed, truncated, altered or mismatched."""


class UnsupportedModelError(CheckpointError):
    """The architecture, or a setting of it, is not declared by any family."""


class BackendError(LmiError):
    """A backend is unknown, unavailable on this machine, or cannot run this model."""


class CapacityError(LmiError):
    """Memory or disk does not suffice; the message says by how much."""


class RankError(LmiError):
    """A rank died, hangs or raised; the message names it, and carries its traceback."""


class AwsError(LmiError):
    """AWS refuses a request, cannot be reached, or an endpoint fails."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its class where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
