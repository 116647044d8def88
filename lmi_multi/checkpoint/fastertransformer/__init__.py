"""FasterTransformer's files, read as a checkpoint: `config.ini` beside one raw file a tensor and
GPU, in a folder `N-gpu`.

`ini` reads the settings, `layouts` says per family which file holds what, `reader` merges the
GPUs' files and presents the result as a Hugging Face checkpoint, so that nothing behind it has to
know.
"""

from lmi_multi.checkpoint.fastertransformer.reader import (
    FasterTransformerReader,
    files,
    find,
    is_layout,
)

__all__ = ["FasterTransformerReader", "files", "find", "is_layout"]
