"""Converts a source and puts the artifact on S3."""

from __future__ import annotations

from pathlib import Path

from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.cache import open_or_convert
from lmi_multi.checkpoint.s3.address import Address
from lmi_multi.checkpoint.s3.upload import upload
from lmi_multi.checkpoint.writer import Progress
from lmi_multi.errors import OptionError


def publish(
    source: str | Path,
    target: str,
    *,
    dtype: str = "auto",
    quantize: str | None = None,
    tensor_parallel: int = 1,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Put `source` as an artifact into the folder `target`, `s3://bucket/prefix`; returns it.

    It is made in the cache, as `open_or_convert` does, and stays there, so that an upload that
    fails can be repeated without converting again. The manifest goes up last. A source that is an
    artifact already goes up as it is. Raises what these two raise, and OptionError for an artifact
    of another degree.
    """
    address = Address.parse(target)
    artifact = open_or_convert(
        source,
        revision=revision,
        dtype=dtype,
        quantize=quantize,
        tensor_parallel=tensor_parallel,
        progress=progress,
    )
    if artifact.tensor_parallel != tensor_parallel:
        raise OptionError(
            f"tensor_parallel is {tensor_parallel}, but the artifact {artifact.folder} was "
            f"converted for {artifact.tensor_parallel}; convert its source again"
        )
    upload(artifact, address, progress)
    return artifact
