"""Which family a `config.ini` describes, and how that family is stored.

Matrices are stored [in, out]. GPUs share the outputs of the first matrix of a pair (qkv, the FFN's
first) and the inputs of the second; q, k and v are one tensor [in, 3, out], except in T5's encoder
and its cross-attention. Embeddings, heads, norms and the second matrices' biases are stored once.
"""

from __future__ import annotations

from collections.abc import Callable

from lmi_multi.checkpoint.fastertransformer.bins import Layout
from lmi_multi.checkpoint.fastertransformer.decoders import gpt, gptj, gptneox
from lmi_multi.checkpoint.fastertransformer.ini import Ini
from lmi_multi.checkpoint.fastertransformer.t5 import t5
from lmi_multi.errors import CheckpointError, UnsupportedModelError

_SECTIONS: dict[str, Callable[[Ini], Layout]] = {
    "encoder": t5,
    "gpt": gpt,
    "gptj": gptj,
    "gptneox": gptneox,
}


def layout_of(ini: Ini, most_layers: int) -> Layout:
    """The layout that `ini` describes; it has at most `most_layers` layers, as many as files.

    Raises CheckpointError for settings that are missing or wrong, UnsupportedModelError for a
    model that is none of ours.
    """
    for section, build in _SECTIONS.items():
        if section in ini.sections:
            _check_layers(ini, section, most_layers)
            return build(ini)
    found = ", ".join(f"[{name}]" for name in ini.sections) or "none"
    raise UnsupportedModelError(
        f"{ini.path}: sections are {found}; supported models have one of "
        f"{', '.join(f'[{name}]' for name in _SECTIONS)}"
    )


def _check_layers(ini: Ini, section: str, most: int) -> None:
    """Before a table of that many layers is built."""
    key = "num_layers" if section == "encoder" else "num_layer"
    for name in (section, "decoder") if section == "encoder" else (section,):
        if ini.value(name, key) is not None and ini.size(name, key) > most:
            raise CheckpointError(
                f"{ini.path}: [{name}] {key} is {ini.size(name, key)}, but there are {most} files"
            )
