"""The families this package knows."""

from __future__ import annotations

from lmi_multi.errors import UnsupportedModelError
from lmi_multi.models.bert import BERT
from lmi_multi.models.bloom import BLOOM
from lmi_multi.models.family import Family
from lmi_multi.models.gpt2 import GPT2
from lmi_multi.models.gptj import GPTJ
from lmi_multi.models.gptneox import GPT_NEOX
from lmi_multi.models.llama import LLAMA
from lmi_multi.models.opt import OPT
from lmi_multi.models.t5 import T5

FAMILIES: tuple[Family, ...] = (T5, GPT2, OPT, BLOOM, GPTJ, GPT_NEOX, LLAMA, BERT)


def family_of(architecture: str) -> Family:
    """The family that declares `architecture` (an entry of config.json's `architectures`).

    Raises UnsupportedModelError that names the architecture and lists those known.
    """
    for family in FAMILIES:
        if architecture in family.architectures:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise UnsupportedModelError(f"architecture {architecture!r} is not supported; known: {known}")
