"""What a model's ranks hold, in every format and split, from its config and headers alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import get_args

from lmi_multi.backends.limits import default_tokens
from lmi_multi.backends.memory import DEFAULT_BATCH, STEP_TOKENS, Need, workspace_bytes
from lmi_multi.checkpoint.artifact import Artifact, is_artifact
from lmi_multi.checkpoint.convert import chosen_dtype
from lmi_multi.checkpoint.formats import open_reader
from lmi_multi.checkpoint.layout import (
    DTYPES,
    DtypeName,
    QuantizeName,
    Stored,
    stored_tensors,
)
from lmi_multi.checkpoint.outline import outlined
from lmi_multi.checkpoint.plan import make_plan
from lmi_multi.models.spec import ModelSpec
from lmi_multi.models.stages import Stage, plan_stages
from lmi_multi.models.weights import LARGEST


@dataclass(frozen=True)
class _Held:
    """What each rank of a stage holds: bytes of weights, and the elements of its largest quantized
    one."""

    stage: Stage
    weights: int
    widest: int


@dataclass(frozen=True)
class Network:
    """What the estimates are made of. `dtype` and `quantize` are the source's own.

    An artifact is loaded as it is; anything else can be converted to every dtype.
    """

    source: str
    spec: ModelSpec
    tensors: tuple[str, ...]
    dtype: DtypeName
    quantize: QuantizeName | None
    is_artifact: bool
    _known: dict[tuple[DtypeName, QuantizeName | None, int, int], list[_Held]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def of(cls, artifact: Artifact, name: str) -> Network:
        """What `artifact` is, which people call `name`."""
        names = tuple(artifact.manifest.tensors)
        return cls(name, artifact.spec, names, artifact.dtype, artifact.quantize, True)

    def formats(self) -> list[tuple[DtypeName, QuantizeName | None]]:
        """The combinations of dtype and quantization that can be loaded."""
        if self.is_artifact:
            return [(self.dtype, self.quantize)]
        kinds: tuple[QuantizeName | None, ...] = (None, *get_args(QuantizeName))
        return [(dtype, kind) for kind in kinds for dtype in get_args(DtypeName)]

    def convertible(self) -> Network:
        """The same if its source were converted again: to any format."""
        return replace(self, is_artifact=False)

    def converted(self, dtype: DtypeName | None, quantize: QuantizeName | None) -> Network:
        """As it would be converted, with None for its own dtype; an artifact stays as it is."""
        if self.is_artifact:
            return self
        return replace(self, dtype=dtype or self.dtype, quantize=quantize)

    def stored(self) -> list[Stored]:
        """The tensors in the source's own format."""
        return stored_tensors(self.spec, self.tensors, self.dtype, self.quantize)

    def weight_bytes(self, dtype: DtypeName, quantize: QuantizeName | None, degree: int) -> int:
        """Bytes of weights on each of `degree` ranks."""
        return self._held(dtype, quantize, degree, 1)[0].weights

    def workspace_bytes(
        self,
        dtype: DtypeName,
        quantize: QuantizeName | None,
        degree: int,
        max_batch: int | None,
        max_tokens: int | None,
    ) -> int:
        """Bytes that each of `degree` GPUs needs beside weights and cache; None as in `load`."""
        return self.needs(dtype, quantize, degree, 1, max_batch, max_tokens)[0].workspace

    def needs(
        self,
        dtype: DtypeName,
        quantize: QuantizeName | None,
        degree: int,
        stages: int,
        max_batch: int | None,
        max_tokens: int | None,
        step_tokens: int = STEP_TOKENS,
    ) -> list[Need]:
        """What each of a stage's `degree` ranks needs, for every one of the pipeline `stages`;
        None as in `load`. `step_tokens`: those of the largest step.
        Raises OptionError if there cannot be as many stages."""
        return [
            Need(
                weights=held.weights,
                workspace=workspace_bytes(
                    self.spec,
                    widest=held.widest,
                    item_bytes=DTYPES[dtype].itemsize,
                    ranks=degree,
                    max_batch=max_batch or DEFAULT_BATCH,
                    max_tokens=max_tokens or default_tokens(self.spec),
                    step_tokens=step_tokens,
                    stage=held.stage,
                ),
                layers=len(held.stage.decoder),
            )
            for held in self._held(dtype, quantize, degree, stages)
        ]

    def _held(
        self, dtype: DtypeName, quantize: QuantizeName | None, degree: int, stages: int
    ) -> list[_Held]:
        key = (dtype, quantize, degree, stages)
        if key not in self._known:  # the same for every instance
            stored = stored_tensors(self.spec, self.tensors, dtype, quantize)
            sizes = {tensor.name: tensor.nbytes(1) for tensor in stored}
            self._known[key] = []
            for stage in plan_stages(self.spec, sizes, stages):
                names = stage.tensors(sizes)
                own = [tensor for tensor in stored if tensor.name in names]
                codes = (prod(t.local_shape(degree)) for t in own if t.dtype in LARGEST)
                weights = sum(tensor.nbytes(degree) for tensor in own)
                self._known[key].append(_Held(stage, weights, max(codes, default=0)))
        return self._known[key]


def read_network(source: str | Path, revision: str | None = None) -> Network:
    """Read what `source` is from its config and headers, or its manifest; no tensor is read.

    A head of its own that is a copy of the embedding counts twice unless config.json says that
    they are tied. Raises the errors of `outlined`, `Artifact.open` and `make_plan`.
    """
    with outlined(source, revision) as found:
        if is_artifact(found.folder):
            return Network.of(Artifact.open(found.folder, ranks=()), found.name)
        plan = make_plan(found.folder, open_reader(found.folder), compare=False)
        dtype = chosen_dtype(plan, "auto")
        return Network(found.name, plan.spec, tuple(plan.tensors), dtype, None, False)
