"""Inferentia and Trainium: detection only so far."""

from __future__ import annotations

from pathlib import Path

from lmi_multi.backends.base import Availability, Executor
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.errors import BackendError


class NeuronBackend:
    """`lmi_multi.backends.base.Backend` that is never available in this version."""

    name = "neuron"

    def probe(self) -> Availability:
        """Unavailable; tells a host with NeuronCores from one without."""
        devices = tuple(str(path) for path in sorted(Path("/dev").glob("neuron[0-9]*")))
        found = f"{len(devices)} Neuron devices found, but " if devices else ""
        return Availability(
            "neuron",
            False,
            f"{found}this version does not run on Neuron yet",
            "use backend='cpu' or 'cuda'",
            devices,
        )

    def load(
        self,
        artifact: Artifact,
        *,
        tensor_parallel: int,
        max_batch: int | None,
        max_tokens: int | None,
    ) -> Executor:
        """Always raises BackendError."""
        raise BackendError("this version does not run on Neuron yet")
