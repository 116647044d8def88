"""One runtime for large models on AWS: NVIDIA GPUs, Inferentia and Trainium, and CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lmi_multi.checkpoint.convert import convert
    from lmi_multi.completion import Completion
    from lmi_multi.errors import LmiError
    from lmi_multi.model import Model, load
    from lmi_multi.options import GenerateOptions

_HOME = {
    "load": "lmi_multi.model",
    "Model": "lmi_multi.model",
    "convert": "lmi_multi.checkpoint.convert",
    "GenerateOptions": "lmi_multi.options",
    "Completion": "lmi_multi.completion",
    "LmiError": "lmi_multi.errors",
}

__all__ = ["Completion", "GenerateOptions", "LmiError", "Model", "__version__", "convert", "load"]


def __getattr__(name: str) -> Any:
    """Import on first use: `import lmi_multi` stays fast, torch comes with the first model."""
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module 'lmi_multi' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
