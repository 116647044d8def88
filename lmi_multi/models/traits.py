"""What prompts and options are checked against: the little that callers need to know of a network,
whoever computes it."""

from __future__ import annotations

from dataclasses import dataclass

from lmi_multi.models.spec import Kind, ModelSpec


@dataclass(frozen=True, kw_only=True)
class Traits:
    """A network as its callers see it. Each field means what that of a `ModelSpec` means, which has
    them all; a network that no family declares has nothing else."""

    family: str
    kind: Kind
    vocab: int
    hidden: int
    segments: int = 0
    length_dependent: bool = True  # unless it is known that it is not

    @classmethod
    def of(cls, spec: ModelSpec | Traits) -> Traits:
        """Those of any network."""
        return cls(
            family=spec.family,
            kind=spec.kind,
            vocab=spec.vocab,
            hidden=spec.hidden,
            segments=spec.segments,
            length_dependent=spec.length_dependent,
        )
