"""The user's handle: a loaded model that generates, scores and embeds."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lmi_multi import backends, chat, embedding, streaming
from lmi_multi.backends.base import Executor
from lmi_multi.backends.limits import check_sizes
from lmi_multi.backends.memory import check_share
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.cache import open_or_convert
from lmi_multi.checkpoint.convert import Progress, check_options
from lmi_multi.checkpoint.remote import check_ranks
from lmi_multi.checkpoint.source import Source, resolve
from lmi_multi.completion import Completion
from lmi_multi.defaults import GenerationDefaults
from lmi_multi.engine.batch import Passage, groups
from lmi_multi.engine.batch import Prompt as EncoderPrompt
from lmi_multi.engine.engine import Engine
from lmi_multi.engine.request import Job
from lmi_multi.engine.sequence import Sequence as EngineSequence
from lmi_multi.errors import OptionError, UnsupportedModelError
from lmi_multi.fallback import foreign
from lmi_multi.fallback.foreign import Foreign
from lmi_multi.models.schema import check_degree
from lmi_multi.models.spec import ModelSpec
from lmi_multi.models.stages import check_stages
from lmi_multi.models.traits import Traits
from lmi_multi.options import GenerateOptions, per_prompt
from lmi_multi.parallel import torchrun
from lmi_multi.prompts import Prompt, PromptReader, Prompts
from lmi_multi.streaming import Chunk
from lmi_multi.tokenizer import Tokenizer, load_tokenizer, text_of

log = logging.getLogger("lmi_multi")

Options = GenerateOptions | Mapping[str, Any] | Sequence[GenerateOptions | Mapping[str, Any] | None]


@dataclass(frozen=True)
class Stats:
    """What the last `generate` did."""

    prompts: int
    generated_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the whole time, prefill included."""
        return self.generated_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Encoded:
    """The last hidden states of one prompt: `hidden` float32 [tokens, hidden]; `pooled` float32
    [hidden] where the network has a pooler (BERT)."""

    hidden: Tensor
    pooled: Tensor | None


def load(
    source: str | Path,
    *,
    backend: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    max_batch: int | None = None,
    max_tokens: int | None = None,
    memory_share: float | None = None,
    revision: str | None = None,
    verify: bool = False,
    prefix_caching: bool = True,
    fallback: str | None = None,
    progress: Progress | None = None,
) -> Model:
    """Load a model from a local folder, "s3://bucket/prefix", a Hugging Face Hub id, or "demo".

    Anything but an artifact is converted once into a cache folder. `backend` is
    "auto", "cuda", "neuron" or "cpu"; `dtype` "auto" (the checkpoint's own, bf16 for T5 in place
    of fp16), "fp32", "fp16" or "bf16"; `quantize` None, "int8" or "fp8" (e4m3). `tensor_parallel`
    ranks share every layer, `pipeline_parallel` stages share the layers, each rank is a process;
    under torchrun its processes are the ranks (docs/parallelism.md). `max_batch` rows run at once;
    `max_tokens` bounds prompt plus generated tokens of a decoder, and each of the two for an
    encoder-decoder. `memory_share`, above 0 and at most 1, is the part of a GPU's memory (CPU: of
    the host's) that the model may take in all, None for 0.9: the cache gets what weights and steps
    leave of it. `verify` compares the artifact's files with their sha256 first. With
    `prefix_caching` prompts of a decoder-only model that begin alike, in one call or in several,
    share what has been computed of them. `fallback="transformers"`: what no family declares, of
    transformers' own causal and sequence-to-sequence architectures, runs through transformers, one
    prompt at a time, without `quantize`, ranks or beams; what a family declares runs as
    ever. `progress` is called with bytes done, bytes in all, and the file's or tensor's name while
    downloading from S3 and while converting; by several threads, but never by two at once.

    Raises OptionError, CheckpointError, BackendError or CapacityError, each one clear line.
    """
    for name, flag in (("verify", verify), ("prefix_caching", prefix_caching)):
        if not isinstance(flag, bool):
            raise OptionError(f"{name} is {flag!r:.80}; allowed: True or False")
    check_share(memory_share)
    found: str | Path | Source = source
    if fallback is not None:
        foreign.check_options(
            fallback,
            quantize=quantize,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            max_batch=max_batch,
            verify=verify,
            memory_share=memory_share,
        )
        found = resolve(source, revision, progress)
        if not foreign.is_declared(found.folder):
            return _load_foreign(found.folder, backend, dtype, max_tokens)
    chosen = backends.select(backend)
    check_options(dtype, quantize, tensor_parallel, pipeline_parallel)
    check_sizes(max_batch, max_tokens)
    job = torchrun.job(tensor_parallel, pipeline_parallel)
    chosen.check_load(
        tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel, quantize=quantize
    )
    try:
        check_ranks(
            found,
            revision,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
        )
        artifact = open_or_convert(
            found,
            revision=revision,
            dtype=dtype,
            quantize=quantize,
            tensor_parallel=tensor_parallel,
            rank=None if job is None else job.rank % tensor_parallel,
            verify=verify,
            progress=progress,
        )
    except UnsupportedModelError as error:
        if fallback is None:
            raise UnsupportedModelError(f"{error}; fallback='transformers' may run it") from None
        raise
    check_degree(artifact.spec, tensor_parallel)
    check_stages(artifact.spec, pipeline_parallel)
    executor = chosen.load(
        artifact,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        max_batch=max_batch,
        max_tokens=max_tokens,
        memory_share=memory_share,
    )
    return _opened(artifact, chosen.name, executor, prefix_caching)


def _opened(
    artifact: Artifact | Foreign, backend: str, executor: Executor, prefix_caching: bool
) -> Model:
    """The model, or else nothing that is left of its executor."""
    try:
        return Model(artifact, backend, executor, prefix_caching)
    except BaseException:
        executor.close()
        raise


def _load_foreign(folder: Path, backend: str, dtype: str, max_tokens: int | None) -> Model:
    from lmi_multi.fallback import loading

    check_options(dtype, None, 1)
    found = Foreign.read(folder)
    executor = loading.load(found, backend=backend, dtype=dtype, max_tokens=max_tokens)
    return _opened(found, foreign.NAME, executor, prefix_caching=False)


class Model:
    """A loaded model. Safe to use from several threads; close it, or use it in a `with`."""

    def __init__(
        self,
        artifact: Artifact | Foreign,
        backend: str,
        executor: Executor,
        prefix_caching: bool = True,
    ) -> None:
        self.backend = backend
        self.device = executor.device
        self.spec: ModelSpec | Traits = artifact.spec
        self.artifact = artifact
        self.limits = executor.limits
        self.tokenizer: Tokenizer | None = load_tokenizer(artifact.folder)
        self.defaults = GenerationDefaults.read(artifact.folder)
        self.stats = Stats(0, 0, 0.0)
        self._reader = PromptReader(self.spec, self.limits, self.tokenizer, self.defaults)
        reusable = self.spec.kind == "decoder" and not self.spec.length_dependent
        self._engine = Engine(executor, prefix_caching and reusable)
        self._closed = False
        if self.defaults.unsupported:
            log.warning(
                "%s asks for settings that this version does not apply: %s",
                self.defaults.source,
                ", ".join(self.defaults.unsupported),
            )

    def generate(
        self, prompts: Prompts, options: Options | None = None, **keywords: Any
    ) -> list[Completion]:
        """Complete every prompt; results come in the order of the prompts.

        With `num_return_sequences`, a prompt's answers follow each other; those of a beam search
        come the best first.

        Prompts are one string, many, or lists of token ids. Options are a `GenerateOptions` or a
        mapping, one for all or one a prompt, and the same names as keywords, which win. Raises
        OptionError before anything runs if a prompt or an option is invalid, or if a prompt with
        its answer would exceed `limits.max_tokens`.
        """
        given, ids, jobs = self._jobs(prompts, options, keywords)
        start = time.perf_counter()
        self._engine.run([request for job in jobs for request in job.requests])
        wanted = [job.answers[0].options.prompt_logprobs for job in jobs]
        scores = self._score([Passage(p) for p, want in zip(ids, wanted, strict=True) if want])
        known = [[None, *next(scores).tolist()] if want else None for want in wanted]
        completions = [
            self._completion(prompt, token_ids, sequence, scored)
            for prompt, token_ids, job, scored in zip(given, ids, jobs, known, strict=True)
            for sequence in job.answers
        ]
        generated = sum(len(c.token_ids) for c in completions)
        self.stats = Stats(len(given), generated, time.perf_counter() - start)
        return completions

    def stream(
        self, prompts: Prompts, options: Options | None = None, **keywords: Any
    ) -> Iterator[Chunk]:
        """Like `generate`, but yields what each step adds; all prompts advance together.

        Everything is checked before this returns. The texts of a prompt's chunks, joined, are
        its completion's text. An answer that beam search finds is one chunk: until its end any
        other could become the best. Closing the iterator frees the prompts' places.
        """
        _, _, jobs = self._jobs(prompts, options, keywords, streaming=True)
        if any(job.answers[0].options.prompt_logprobs for job in jobs):
            raise OptionError("prompt_logprobs is True; allowed: False while streaming, or score")
        return streaming.stream(self._engine, jobs)

    def astream(
        self, prompts: Prompts, options: Options | None = None, **keywords: Any
    ) -> AsyncIterator[Chunk]:
        """`stream` for asyncio. Cancelling the task frees the prompts' places."""
        return streaming.in_thread(self.stream(prompts, options, **keywords))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: Options | None = None,
        **keywords: Any,
    ) -> Completion:
        """Answer a conversation, rendered with the tokenizer's chat template.

        `messages` are mappings with "role" and "content". The template runs in transformers'
        immutable sandbox. Raises OptionError if the model has no template or it refuses the
        messages.
        """
        ids = chat.render(self.tokenizer, messages)
        return self.generate([ids], options, **keywords)[0]

    def score(self, prompts: Prompts, continuations: Prompts) -> list[npt.NDArray[np.float32]]:
        """Log-probability of every token of each continuation after its prompt, float32 [tokens].

        A decoder reads prompt and continuation as one text, so a continuation that is a string is
        tokenized without special tokens; an encoder-decoder reads the prompt, and the
        continuation is its answer.
        """
        self._check_open("decoder", "encoder-decoder")
        _, ids = self._reader.read(prompts)
        answers = self._reader.continuations(continuations)
        if len(ids) != len(answers):
            raise OptionError(f"{len(answers)} continuations for {len(ids)} prompts")
        passages = [
            self._reader.passage(i, own, answer)
            for i, (own, answer) in enumerate(zip(ids, answers, strict=True))
        ]
        scores = zip(self._score(passages), answers, strict=True)
        return [own[len(own) - len(answer) :].numpy() for own, answer in scores]

    def encode(
        self, prompts: Prompts, segment_ids: Sequence[Sequence[int]] | None = None
    ) -> list[Encoded]:
        """The last hidden states of every prompt: the encoder's, or a decoder-only network's.

        `segment_ids` are BERT's token types, one list a prompt; all zero if not given.
        """
        self._check_open()
        _, ids = self._reader.read(prompts)
        segments = self._reader.segments(ids, segment_ids)
        results: list[Encoded] = []
        for batch in groups([len(own) for own in ids], self.limits.max_step_tokens):
            chosen = [EncoderPrompt(ids[i], segments[i]) for i in batch]
            hidden, pooled = self._engine.encode(chosen)
            parts = hidden.split_with_sizes([len(prompt.token_ids) for prompt in chosen])
            rows = [None] * len(batch) if pooled is None else pooled.unbind()
            results += [Encoded(h, p) for h, p in zip(parts, rows, strict=True)]
        return results

    def embed(
        self, texts: Prompts, pooling: embedding.Pooling = "mean", normalize: bool = True
    ) -> npt.NDArray[np.float32]:
        """One vector a text: float32 [texts, hidden].

        `pooling` is "mean" over all tokens, "cls" (the first) or "last"; `normalize` scales to
        length 1. Both as in sentence-transformers.
        """
        embedding.check_pooling(pooling)
        rows = [embedding.pool(e.hidden, pooling, normalize) for e in self.encode(texts)]
        return np.stack(rows) if rows else np.zeros((0, self.spec.hidden), dtype=np.float32)

    @property
    def engine(self) -> Engine:
        """What runs the model's steps, for those who bring requests of their own."""
        return self._engine

    def close(self) -> None:
        """Free the model. Calling it twice is fine."""
        if not self._closed:
            self._engine.close()
            self._closed = True  # last: an interrupted close can be repeated

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self, *kinds: str) -> None:
        if self._closed:
            raise OptionError("the model is closed")
        if kinds and self.spec.kind not in kinds:
            raise OptionError(
                f"{self.spec.family} is an {self.spec.kind} and generates no text: use encode"
            )

    def _jobs(
        self,
        prompts: Prompts,
        options: Options | None,
        keywords: Mapping[str, Any],
        streaming: bool = False,
    ) -> tuple[list[Prompt], list[list[int]], list[Job]]:
        """Every prompt as given, as token ids, and as work for the engine."""
        self._check_open("decoder", "encoder-decoder")
        given, ids = self._reader.read(prompts)
        wanted = per_prompt(options, len(given), keywords)
        return given, ids, self._reader.jobs(ids, wanted, streaming)

    def _score(self, passages: Sequence[Passage]) -> Iterator[Tensor]:
        """Log-probabilities of all but the first token of each passage: float32 [tokens - 1]."""
        sizes = [len(p.token_ids) + len(p.encoder_ids or ()) for p in passages]
        for batch in groups(sizes, self.limits.max_step_tokens):
            chosen = [passages[i] for i in batch]
            counts = [len(p.token_ids) - 1 for p in chosen]
            yield from self._engine.score(chosen).split_with_sizes(counts)

    def _completion(
        self,
        prompt: Prompt,
        ids: list[int],
        sequence: EngineSequence,
        prompt_logprobs: list[float | None] | None,
    ) -> Completion:
        text = None
        if sequence.detokenizer is not None:
            text = "".join(sequence.pieces)
        elif self.tokenizer is not None:
            text = text_of(self.tokenizer, sequence.shown)
        if text is not None and sequence.options.return_full_text and self.tokenizer is not None:
            text = (prompt if isinstance(prompt, str) else text_of(self.tokenizer, ids)) + text
        return Completion(
            prompt=prompt,
            prompt_token_ids=ids,
            text=text,
            token_ids=sequence.generated,
            finish_reason=sequence.finish_reason or "cancelled",
            error=sequence.error,
            logprobs=list(sequence.logprobs) if sequence.options.logprobs is not None else None,
            cumulative_logprob=sequence.cumulative_logprob,
            prompt_logprobs=prompt_logprobs,
            score=sequence.score,
        )
