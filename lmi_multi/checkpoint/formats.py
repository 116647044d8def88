"""Opens a checkpoint folder with the reader of its layout."""

from __future__ import annotations

from pathlib import Path

from lmi_multi.checkpoint import fastertransformer
from lmi_multi.checkpoint.reader import CheckpointReader, Reader


def open_reader(folder: Path) -> Reader:
    """The reader of `folder`: Hugging Face's layout, or FasterTransformer's.

    Raises CheckpointError when the files are missing, malformed, truncated or disagree.
    """
    if fastertransformer.find(folder) == folder:
        return fastertransformer.FasterTransformerReader(folder)
    return CheckpointReader(folder)
