"""One prompt's settings, complete, and what they make of each step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from lmi_multi.errors import OptionError
from lmi_multi.ops.bans import ngram_bans, word_bans
from lmi_multi.ops.processors import Edit
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

    def row(
        self,
        step: int,
        tokens: Sequence[int] = (),
        encoder_ids: Sequence[int] = (),
        stream: int = 0,
    ) -> SampleRow:
        """How to draw token number `step`, counted from 0 over the generated tokens.

        `tokens` are the decoder's so far, `step` generated ones at their end; `encoder_ids` the
        prompt of an encoder-decoder. Answers to one prompt differ in `stream`.
        """
        if self._is_plain:
            return _likeliest(step, stream)
        if self._is_simple and step >= self.min_new_tokens:
            return self._simple.at(step, stream)
        forced = self._forced(step, tokens)
        return self._simple._replace(
            step=step,
            banned=self._banned(step, tokens, bool(forced)),
            edit=Edit(forced=forced) if forced else self._edit(step, tokens, encoder_ids),
            stream=stream,
        )

    def ahead(self, step: int, stream: int = 0) -> SampleRow | None:
        """`row` for a step whose tokens are not known yet; None if it depends on them, or if the
        answer does not get that far."""
        if step >= self.max_new_tokens:
            return None
        if self._is_plain:
            return _likeliest(step, stream)
        return None if self._reads_tokens else self.row(step, stream=stream)

    @cached_property
    def _reads_tokens(self) -> bool:
        """Whether a step's draw depends on the tokens before it."""
        return bool(
            self.repetition_penalty != 1
            or self.encoder_repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.no_repeat_ngram_size
            or self.bad_words
            or self.forced_bos_token_id is not None
        )

    @cached_property
    def goes_ahead(self) -> bool:
        """Whether each step's draw can be begun before the tokens before it are known, by whoever
        looks at logits and nothing else."""
        return self._is_simple and self.logprobs is None

    @cached_property
    def _is_simple(self) -> bool:
        """Whether all steps draw alike, but for the end tokens that come too early."""
        return not (self._reads_tokens or self.forced_eos_token_ids or self.logit_bias)

    @cached_property
    def _is_plain(self) -> bool:
        """Whether the likeliest token is wanted in every step, and nothing else."""
        return self._is_simple and not self.min_new_tokens and self._simple == SampleRow()

    @cached_property
    def _simple(self) -> SampleRow:
        """What is the same in all steps."""
        row = SampleRow(banned=tuple(dict.fromkeys(self.suppress_tokens)), logprobs=self.logprobs)
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

    def _forced(self, step: int, tokens: Sequence[int]) -> tuple[int, ...]:
        """The ids of which one must come, if any. As with Hugging Face the end has the last word,
        and a beginning is where the decoder has one token."""
        if self.forced_eos_token_ids and step == self.max_new_tokens - 1:
            return self.forced_eos_token_ids
        if self.forced_bos_token_id is not None and len(tokens) == 1:
            return (self.forced_bos_token_id,)
        return ()

    def _banned(self, step: int, tokens: Sequence[int], forced: bool) -> tuple[int, ...]:
        """The ids that must not come. Only suppressed tokens are stronger than a forced one."""
        if forced:
            return self.suppress_tokens
        banned = [*self.suppress_tokens]
        if self.no_repeat_ngram_size:
            banned += ngram_bans(tokens, self.no_repeat_ngram_size)
        if self.bad_words:
            banned += word_bans(tokens, self.bad_words)
        if step < self.min_new_tokens:
            banned += self.end_token_ids
        return tuple(dict.fromkeys(banned))

    def _edit(self, step: int, tokens: Sequence[int], encoder_ids: Sequence[int]) -> Edit | None:
        """Bias and penalties; None where there are none.

        Nothing here looks for padding: a sequence has none, and a token that was read or drawn
        counts whatever its id.
        """
        given = len(tokens) - step
        repeats, prompt = self.repetition_penalty != 1, self.encoder_repetition_penalty != 1
        edit = Edit(
            bias=self.logit_bias,
            prompt=_distinct(encoder_ids or tokens[:given]) if prompt else (),
            encoder_repetition_penalty=self.encoder_repetition_penalty,
            seen=_distinct(tokens) if repeats else (),
            repetition_penalty=self.repetition_penalty,
            counted=self._counted(tokens[given:]),
        )
        return edit if edit.bias or edit.prompt or edit.seen or edit.counted else None

    def _counted(self, generated: Sequence[int]) -> tuple[tuple[int, float], ...]:
        """What presence and frequency add to the logit of each generated token: mostly less."""
        if not self.presence_penalty and not self.frequency_penalty:
            return ()
        counts = Counter(generated).items()
        return tuple(
            (token, -self.presence_penalty - self.frequency_penalty * count)
            for token, count in counts
        )


@lru_cache(maxsize=4096)
def _likeliest(step: int, stream: int) -> SampleRow:
    """One for all rows that draw so: nothing to make, and equal at a glance."""
    return SampleRow(step=step, stream=stream)


def _distinct(tokens: Sequence[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(tokens))
