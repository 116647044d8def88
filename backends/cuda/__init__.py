"""The CUDA backend."""

from __future__ import annotations

from .backend import CudaBackend

BACKEND = CudaBackend()
