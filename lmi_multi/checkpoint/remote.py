"""What can be refused of a remote checkpoint before it is downloaded."""

from __future__ import annotations

from pathlib import Path

from lmi_multi.checkpoint import hub
from lmi_multi.checkpoint.artifact import Artifact, is_artifact
from lmi_multi.checkpoint.outline import outlined
from lmi_multi.checkpoint.s3.address import is_address
from lmi_multi.checkpoint.source import Source, is_local
from lmi_multi.errors import CheckpointError, OptionError, UnsupportedModelError
from lmi_multi.models.config import Config
from lmi_multi.models.registry import family_of
from lmi_multi.models.schema import check_degree
from lmi_multi.models.spec import ModelSpec
from lmi_multi.models.stages import check_stages


def check_ranks(
    source: str | Path | Source,
    revision: str | None,
    *,
    tensor_parallel: int,
    pipeline_parallel: int,
) -> None:
    """Raise OptionError for ranks that the network of a remote source cannot have, by its
    config.json or manifest alone, and UnsupportedModelError for one that no family declares.

    Nothing is fetched for a single rank, and of a local source, which is checked when it is opened.
    Where config and manifest cannot be had nothing is raised: fetching the source says why.
    """
    if tensor_parallel == pipeline_parallel == 1 or isinstance(source, Source) or _is_here(source):
        return
    spec = _spec(source, revision)
    if spec is not None:
        check_degree(spec, tensor_parallel)
        check_stages(spec, pipeline_parallel)


def _is_here(source: str | Path) -> bool:
    return is_local(source) or (hub.is_offline() and not is_address(source))


def _spec(source: str | Path, revision: str | None) -> ModelSpec | None:
    try:
        with outlined(source, revision, headers=False) as found:
            if is_artifact(found.folder):
                return Artifact.open(found.folder, ranks=()).spec
            config = Config.read(found.folder)
            return family_of(config.architecture).spec(config)
    except UnsupportedModelError:
        raise
    except (CheckpointError, OptionError):
        return None
