"""What one rank needs of a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Rank `rank` of tensor-parallel degree `degree`: of an artifact that has files for this degree
    it needs its own weights alone, of anything else all."""

    rank: int
    degree: int
