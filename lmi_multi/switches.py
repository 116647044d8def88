"""Environment variables that switch something off."""

from __future__ import annotations

import os

from lmi_multi.errors import OptionError


def is_off(name: str) -> bool:
    """Whether the variable is 0. Raises OptionError if it is neither that nor 1, nor unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise OptionError(f"{name} is {value!r:.80}; allowed: 0 or 1", name)
    return value == "0"
