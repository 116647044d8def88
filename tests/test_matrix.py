"""One suite for every backend, family, dtype and tensor-parallel degree, against Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmi_multi.backends.base import Executor
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.convert import convert
from lmi_multi.defaults import GenerationDefaults
from lmi_multi.engine.batch import Batch, Prompt, Row
from lmi_multi.engine.engine import Engine
from lmi_multi.engine.sequence import Sequence
from lmi_multi.options import GenerateOptions
from tests.families import ENCODERS, FAMILIES, GENERATORS, VOCAB
from tests.matrix import LIMITS, Cell, cells, executor, unavailable

# float32: the largest difference of any logit. Half types: the error's norm over the norm, a few
# times the unit roundoff (2^-11, 2^-8) for a handful of layers.
LARGEST_ERROR = 1e-4
RELATIVE_ERROR = {"fp16": 5e-3, "bf16": 4e-2}
LENGTHS = (11, 3, 17)
STEPS = 32


@cache
def reference(family: str, folder: Path) -> PreTrainedModel:
    """The Hugging Face model of a family; its checkpoint is in `folder` afterwards."""
    return FAMILIES[family].save(folder / family)


def looks_ahead(model: PreTrainedModel) -> bool:
    """Whether a later decoder token changes an earlier one's logits (UMT5 in transformers 5.17)."""
    if not model.config.is_encoder_decoder:
        return False
    first = []
    with torch.no_grad():
        for last in (8, 9):
            ids = torch.tensor([[0, 7, last]])
            out = model(input_ids=torch.tensor([[5, 6]]), decoder_input_ids=ids)
            first.append(out.logits[0, 0])
    return not torch.equal(*first)


@pytest.fixture
def loaded(cell: Cell, checkpoints: Path) -> Iterator[tuple[PreTrainedModel, Executor]]:
    """The Hugging Face model, and the cell's executor over its converted checkpoint."""
    if reason := unavailable(cell):
        pytest.skip(reason)
    model = reference(cell.family, checkpoints)
    if looks_ahead(model):
        pytest.skip(f"{cell.family}: this release of transformers lets its decoder look ahead")
    # TensorFloat-32 would round what is compared to ten bits.
    assert torch.get_float32_matmul_precision() == "highest"
    target = checkpoints / f"{cell.family}-{cell.dtype}"
    if not target.exists():
        convert(checkpoints / cell.family, target, dtype=cell.dtype)
    with executor(cell, Artifact.open(target)) as opened:
        yield model, opened


def prompts_of(seed: int) -> list[list[int]]:
    """Ragged random prompts; 0 to 2 are special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def assert_close(ours: Tensor, theirs: Tensor, dtype: str) -> None:
    """Within the tolerance that the types allow."""
    assert ours.shape == theirs.shape
    error = ours - theirs
    if dtype == "fp32":
        assert error.abs().max().item() <= LARGEST_ERROR
    else:
        assert (error.norm() / theirs.norm()).item() <= RELATIVE_ERROR[dtype]


@pytest.mark.parametrize("cell", cells(GENERATORS), ids=str)
def test_logits_of_prefill_and_cached_steps(
    cell: Cell, loaded: tuple[PreTrainedModel, Executor], checkpoints: Path
) -> None:
    model, ours = loaded
    prompts, forced = teacher(model)
    # Prefill all but the last tokens, then feed those one by one through the cache.
    tail = 3
    cut = [max(1, len(tokens) - tail) for tokens in forced]
    parts = [step_logits(ours, model, prompts, forced, [0] * len(forced), cut)]
    for step in range(tail):
        start = [c + step for c in cut]
        parts.append(step_logits(ours, model, prompts, forced, start, [s + 1 for s in start]))
    for row, theirs in enumerate(their_logits(cell.family, checkpoints)):
        mine = torch.cat([part[row] for part in parts if row in part])
        assert_close(mine, theirs, cell.dtype)


def teacher(model: PreTrainedModel) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and the decoder tokens that are fed: for decoders the prompts themselves."""
    prompts = prompts_of(0)
    if not model.config.is_encoder_decoder:
        return prompts, prompts
    return prompts, [[0, *tokens[:9]] for tokens in prompts_of(1)]


@cache
def their_logits(family: str, folder: Path) -> list[Tensor]:
    """Hugging Face's logits [tokens, vocab] of every row, each computed alone."""
    model = reference(family, folder)
    results = []
    with torch.no_grad():
        for prompt, tokens in zip(*teacher(model), strict=True):
            ids = torch.tensor([tokens])
            if model.config.is_encoder_decoder:
                out = model(input_ids=torch.tensor([prompt]), decoder_input_ids=ids)
            else:
                out = model(input_ids=ids)
            results.append(out.logits[0].float())
    return results


def step_logits(
    ours: Executor,
    model: PreTrainedModel,
    prompts: list[list[int]],
    tokens: list[list[int]],
    start: list[int],
    stop: list[int],
) -> dict[int, Tensor]:
    """Logits of decoder tokens start to stop of every row that has some; row -> [n, vocab]."""
    encoder = model.config.is_encoder_decoder
    rows: dict[int, Row] = {}
    for i, own in enumerate(tokens):
        if share := own[start[i] : stop[i]]:
            rows[i] = Row(
                token_ids=share,
                start=start[i],
                blocks=range(i * 10, i * 10 + 5),
                prompt_length=len(own),
                cross_blocks=range(i * 10 + 5, i * 10 + 10) if encoder else (),
                cross_length=len(prompts[i]) if encoder else 0,
            )
    if not rows:
        return {}
    order = sorted(rows, key=lambda i: len(rows[i].token_ids) > 1)
    encode = [
        Prompt(prompts[i], None, rows[i].cross_blocks) for i in order if encoder and not start[i]
    ]
    logits = ours.logits(Batch(rows=[rows[i] for i in order], prompts=encode))
    parts = logits.split_with_sizes([len(rows[i].token_ids) for i in order])
    return dict(zip(order, parts, strict=True))


@pytest.mark.parametrize("cell", cells(GENERATORS, ["fp32"]), ids=str)
def test_greedy_tokens_of_ragged_batches(
    cell: Cell, loaded: tuple[PreTrainedModel, Executor], checkpoints: Path
) -> None:
    model, ours = loaded
    encoder = model.config.is_encoder_decoder
    defaults = GenerationDefaults(eos_token_ids=(2,), decoder_start_token_id=0)
    options = GenerateOptions(max_new_tokens=STEPS, min_new_tokens=STEPS)
    sequences = [
        Sequence(
            options=defaults.resolve(
                options,
                prompt_tokens=len(prompt),
                decoder_only=not encoder,
                limit=LIMITS.max_tokens,
            ),
            tokens=[0] if encoder else list(prompt),
            encoder_ids=list(prompt) if encoder else None,
        )
        for prompt in greedy_prompts()
    ]
    Engine(ours).run(sequences)
    theirs = their_tokens(cell.family, checkpoints)
    assert [sequence.generated for sequence in sequences] == theirs


def greedy_prompts() -> list[list[int]]:
    """More prompts than the executor has rows, so that some of them queue."""
    return prompts_of(2) + prompts_of(3)


@cache
def their_tokens(family: str, folder: Path) -> list[list[int]]:
    """Hugging Face's greedy tokens for each prompt alone."""
    model = reference(family, folder)
    return [
        model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            # transformers sizes T5's cache by the encoder's depth and fails on a deeper decoder
            use_cache=not model.config.is_encoder_decoder,
        )[0].tolist()[-STEPS:]
        for prompt in greedy_prompts()
    ]


@pytest.mark.parametrize("cell", cells(ENCODERS), ids=str)
def test_encoder_output(cell: Cell, loaded: tuple[PreTrainedModel, Executor]) -> None:
    model, ours = loaded
    bert = cell.family == "bert"
    prompts = prompts_of(4)
    segments = [[i % 2 for i in range(len(prompt))] for prompt in prompts]
    hidden, pooled = ours.encode(
        [Prompt(p, s if bert else None) for p, s in zip(prompts, segments, strict=True)]
    )
    parts = hidden.split_with_sizes(LENGTHS)
    for i, mine in enumerate(parts):
        ids = torch.tensor([prompts[i]])
        with torch.no_grad():
            if bert:
                out = model(ids, token_type_ids=torch.tensor([segments[i]]))
                assert pooled is not None
                assert_close(pooled[i], out.pooler_output[0], cell.dtype)
            else:
                out = model.encoder(ids)
        assert_close(mine, out.last_hidden_state[0], cell.dtype)
