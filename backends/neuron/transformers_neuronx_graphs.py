"""Graphs that transformers-neuronx compiled: all of a model as one entry of the cache.

The library builds its graphs itself, saves the compiled ones into a folder, under hashes of theirs,
and takes them from there. That folder is what is kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmi_multi.backends.base import Limits
from lmi_multi.errors import CheckpointError

from . import environment, sdk
from .cache import Cache, Key
from .program import Toolchain
from .transformers_neuronx_ports import LIBRARY, Port

logger = logging.getLogger(__name__)


def key_of(port: Port, limits: Limits, degree: int, dtype: str) -> Key:
    """What the graphs of a model depend on, beside its sizes, which are in the cache's name."""
    chosen = [port.name, degree, dtype, limits.max_batch, limits.max_tokens]
    digest = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
    flags = environment.compiler_flags(None)  # the library names the hardware itself
    return Key("model", digest, Toolchain("transformers_neuronx", sdk.installed().versions, flags))


def compile_ahead(make: Callable[[], Any], cache: Cache, key: Key) -> tuple[int, bool]:
    """Compile the model that `make` opens, without cores, unless the cache has its graphs.

    Returns how many graphs there are, and whether they were cached. Raises what the library raises,
    and CheckpointError if the cache cannot be written.
    """
    found = cache.find(key)
    if found is not None:
        return len(_open(found).getmembers()), True
    model = make()
    model.cpu_compile()
    packed, count = _packed(model)
    cache.put(key, packed)
    return count, False


def to_cores(make: Callable[[], Any], cache: Cache | None, key: Key) -> Any:
    """The model that `make` opens, on its cores, with graphs from the cache, or else compiled and
    kept there. Raises what the library raises. Without a cache the library's own keeps them."""
    found = None if cache is None else cache.find(key)
    if found is not None and (model := _with_graphs(make, found)) is not None:
        return model
    if found is not None:
        logger.warning("%s/%s has other graphs than %s builds: not used", cache, key.name, LIBRARY)
    elif cache is not None:
        logger.info("graphs are not cached and compiled now; `lmi-multi compile` does so ahead")
        cache.tell_others()
    model = make()
    model.to_neuron()
    if cache is not None:
        try:
            cache.put(key, _packed(model)[0])
        except CheckpointError as error:
            logger.warning("%s; what is compiled now will be compiled again next time", error)
    return model


def _with_graphs(make: Callable[[], Any], packed: bytes) -> Any | None:
    """None if the library looks for graphs that are not there."""
    with tempfile.TemporaryDirectory(prefix="lmi-multi-neuron-") as folder:
        _open(packed).extractall(folder, filter="data")
        model = make()
        model.load(folder)  # where `to_neuron` is to look
        try:
            model.to_neuron()
        except FileNotFoundError:
            return None
    return model


def _packed(model: Any) -> tuple[bytes, int]:
    """The compiled graphs of a model as a tar archive, and how many there are."""
    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory(prefix="lmi-multi-neuron-") as folder:
        model.save(folder)
        files = sorted(Path(folder).iterdir())
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for file in files:
                archive.add(file, file.name)
    return buffer.getvalue(), len(files)


def _open(packed: bytes) -> tarfile.TarFile:
    return tarfile.open(fileobj=io.BytesIO(packed))
