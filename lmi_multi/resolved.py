"""One prompt's settings, complete, and what they make of each step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from lmi_multi.errors import OptionError
from lmi_multi.ops.rules import History, Rules
from lmi_multi.ops.sampling import SampleRow


@dataclass(frozen=True)
class Resolved:
    """Every setting of one prompt's generation, made concrete.

    `max_new_tokens` >= 1 fits the model's limit; `min_new_tokens` is at most that. `temperature`,
    `top_k`, `top_p`, `min_p`, `typical_p` and `seed` matter only where `do_sample`.
    `eos_token_ids` end generation: none where end tokens are ignored. `stop_token_ids` end it
    too. `bad_words` are token ids. `logprobs` None: none are wanted.
    """

    max_new_tokens: int
    min_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    seed: int
    ignore_eos: bool
    stop: tuple[str, ...]
    eos_token_ids: tuple[int, ...]
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    return_full_text: bool = False
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0

    @cached_property
    def group_beams(self) -> int:
        """Beams in each group."""
        return self.num_beams // self.num_beam_groups

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer."""
        return (*self.eos_token_ids, *self.stop_token_ids)

    @property
    def excludes(self) -> bool:
        """Whether there may be steps in which not every token can come."""
        return bool(
            self.min_new_tokens
            or self.no_repeat_ngram_size
            or self.bad_words
            or self.suppress_tokens
            or self.forced_bos_token_id is not None
            or self.forced_eos_token_ids
        )

    def row(self, step: int, history: History | None = None, stream: int = 0) -> SampleRow:
        """How to draw token number `step`, counted from 0 over the generated tokens.

        `history` may be left out unless the draw `reads_tokens`. Answers to one prompt differ in
        `stream`.
        """
        if self._is_plain:
            return _likeliest(step, stream)
        if self._is_simple and step >= self.min_new_tokens:
            return self._simple.at(step, stream)
        read = history if self.rules is not None and self.rules.reads_tokens else None
        row = self._simple.at(step, stream, read)
        if forced := self._forced(step, history):  # only suppressed tokens are stronger
            return row._replace(forced=forced)
        return row._replace(banned=self._banned_early) if step < self.min_new_tokens else row

    def ahead(self, step: int, history: History | None = None, stream: int = 0) -> SampleRow | None:
        """`row` for a step whose tokens may not be known yet; None if the answer does not get that
        far."""
        return self.row(step, history, stream) if step < self.max_new_tokens else None

    @cached_property
    def rules(self) -> Rules | None:
        """What bias and earlier tokens do in every step; None for nothing."""
        rules = Rules(
            bias=self.logit_bias,
            encoder_repetition_penalty=self.encoder_repetition_penalty,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            bad_words=self.bad_words,
        )
        return None if rules == Rules() else rules

    @cached_property
    def reads_tokens(self) -> bool:
        """Whether there are steps whose draw depends on the tokens before it, or on how many were
        given."""
        rules = self.rules
        return self.forced_bos_token_id is not None or (rules is not None and rules.reads_tokens)

    @cached_property
    def goes_ahead(self) -> bool:
        """Whether each step's draw can be begun before the tokens before it are known, by whoever
        looks at logits and nothing else."""
        return self._is_simple and self.logprobs is None

    @cached_property
    def _is_simple(self) -> bool:
        """Whether all steps draw alike, but for the end tokens that come too early."""
        return not (self.reads_tokens or self.forced_eos_token_ids or self.logit_bias)

    @cached_property
    def _is_plain(self) -> bool:
        """Whether the likeliest token is wanted in every step, and nothing else."""
        return self._is_simple and not self.min_new_tokens and self._simple == SampleRow()

    @cached_property
    def _simple(self) -> SampleRow:
        """What is the same in all steps."""
        banned = tuple(dict.fromkeys(self.suppress_tokens))
        row = SampleRow(banned=banned, rules=self.rules, logprobs=self.logprobs)
        if not self.do_sample:
            return row
        return row._replace(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
            seed=self.seed,
        )

    @cached_property
    def _banned_early(self) -> tuple[int, ...]:
        """What must not come while the answer is too short to end, whatever came before."""
        return tuple(dict.fromkeys((*self.suppress_tokens, *self.end_token_ids)))

    def check_ids(self, vocab: int | None = None) -> None:
        """Raise OptionError for ids that the model does not have, and for forced ones that are
        suppressed. `vocab` None: not known."""
        bos = self.forced_bos_token_id
        forced = {
            "forced_bos_token_id": () if bos is None else (bos,),
            "forced_eos_token_id": self.forced_eos_token_ids,
        }
        named = forced | {
            "bad_words": tuple(token for word in self.bad_words for token in word),
            "suppress_tokens": self.suppress_tokens,
            "logit_bias": tuple(token for token, _ in self.logit_bias),
            "stop_token_ids": self.stop_token_ids,
        }
        for name, ids in named.items():
            if vocab is not None and ids and max(ids) >= vocab:
                raise OptionError(
                    f"{name} has the token id {max(ids)}; allowed: 0 to {vocab - 1}, the model's "
                    "vocabulary",
                    name,
                )
        for name, ids in forced.items():
            if ids and set(ids) <= set(self.suppress_tokens):
                raise OptionError(
                    f"{name} is {', '.join(map(str, ids))}, which suppress_tokens has as well; "
                    "allowed: one of the two",
                    name,
                )

    def _forced(self, step: int, history: History | None) -> tuple[int, ...]:
        """The ids of which one must come, if any. As with Hugging Face the end has the last word,
        and a beginning is where the decoder has one token."""
        if self.forced_eos_token_ids and step == self.max_new_tokens - 1:
            return self.forced_eos_token_ids
        bos = self.forced_bos_token_id
        if bos is not None and step == 0 and history is not None and history.given == 1:
            return (bos,)
        return ()


@lru_cache(maxsize=4096)
def _likeliest(step: int, stream: int) -> SampleRow:
    """One for all rows that draw so: nothing to make, and equal at a glance."""
    return SampleRow(step=step, stream=stream)
