"""CTranslate2 (https://github.com/OpenNMT/CTranslate2), which is optional, as a peer of decode
steps: a random transformers model, converted to its format."""

from __future__ import annotations

import gc
import importlib
import tempfile
from collections.abc import Iterator, Sequence
from ctypes import CDLL
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import Answer, Peer, Task
from benchmarks.shapes import DTYPES, SHAPES

LOADERS = {
    "T5ForConditionalGeneration": "T5Loader",
    "GPTJForCausalLM": "GPTJLoader",
    "LlamaForCausalLM": "LlamaLoader",
}
CUBLAS = "libcublas.so.12"  # what its wheels open, once a model computes
COMPUTE = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Vocabulary:
    """As much of a tokenizer as converters ask for: id 5 is '<t5>'."""

    pad_token, eos_token, unk_token, bos_token = (f"<t{i}>" for i in range(4))

    def __init__(self, size: int) -> None:
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        """Ids by token."""
        return {self.convert_ids_to_tokens(i): i for i in range(self.size)}

    def convert_ids_to_tokens(self, token_id: int) -> str:
        """The token of an id."""
        return f"<t{token_id}>"


def _check(task: Task) -> None:
    if find_spec("ctranslate2") is None:
        raise SystemExit("--peer ctranslate2 needs a package: pip install ctranslate2")
    if task.device.type == "cuda":
        try:
            CDLL(CUBLAS)
        except OSError:
            raise SystemExit(
                f"--peer ctranslate2 needs {CUBLAS}, which is not found: see benchmarks/README.md"
            ) from None
    made = SHAPES[task.shape].model
    if made not in LOADERS:
        known = ", ".join(LOADERS)
        raise SystemExit(f"{task.shape} is a {made}; --peer ctranslate2 is tried with {known}")


def _answers(task: Task) -> Iterator[tuple[int, Answer]]:
    engine = _open(task)
    answer = _translated if task.spec.kind == "encoder-decoder" else _continued
    name = Vocabulary(task.spec.vocab).convert_ids_to_tokens
    for rows in task.batches:
        tokens = [[name(i) for i in own] for own in task.prompts(rows)]
        yield rows, partial(answer, engine, tokens)


def _translated(engine: Any, prompts: list[list[str]], count: int) -> Sequence[Sequence[object]]:
    found = engine.translate_batch(
        prompts,
        beam_size=1,
        max_input_length=0,  # no limit
        min_decoding_length=count,
        max_decoding_length=count,
    )
    return [result.hypotheses[0] for result in found]


def _continued(engine: Any, prompts: list[list[str]], count: int) -> Sequence[Sequence[object]]:
    found = engine.generate_batch(
        prompts,
        beam_size=1,
        sampling_topk=1,
        min_length=count,
        max_length=count,
        include_prompt_in_result=False,
    )
    return [result.sequences_ids[0] for result in found]


def _open(task: Task) -> Any:
    """A Translator or a Generator, whose files are gone again."""
    ctranslate2: Any = importlib.import_module("ctranslate2")
    encodes = task.spec.kind == "encoder-decoder"
    made = ctranslate2.Translator if encodes else ctranslate2.Generator
    with tempfile.TemporaryDirectory(dir=task.work) as folder:
        _convert(task, Path(folder))
        return made(
            folder,
            device=task.device.type,
            device_index=task.device.index or 0,
            compute_type=COMPUTE[task.dtype],
        )


@torch.no_grad()
def _convert(task: Task, folder: Path) -> None:
    """Random numbers are made on the device, which is left empty."""
    converters: Any = importlib.import_module("ctranslate2.converters.transformers")
    shape = SHAPES[task.shape]
    model = shape.build(DTYPES[task.dtype], str(task.device)).to("cpu")
    gc.collect()
    torch.cuda.empty_cache()
    spec = getattr(converters, LOADERS[shape.model])()(model, Vocabulary(task.spec.vocab))
    spec.validate()
    # It looks for equal tensors by comparing all with all; among random ones there are none.
    spec._alias_variables = lambda: None
    spec.optimize(quantization=COMPUTE[task.dtype])
    spec.save(str(folder))


CTRANSLATE2 = Peer("CTranslate2", _check, _answers)
