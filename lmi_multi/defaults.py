"""How a call's options are completed: by what the model's files say, else as Hugging Face does."""

from __future__ import annotations

import logging
import secrets
from dataclasses import replace
from functools import lru_cache
from typing import Any

from lmi_multi.errors import OptionError
from lmi_multi.generation_config import GenerationConfig
from lmi_multi.options import GenerateOptions
from lmi_multi.resolved import Resolved
from lmi_multi.tokenizer import Tokenizer
from lmi_multi.values import MAX_WORD_TOKENS, Word

logger = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 20
"""Hugging Face's: what is generated when neither the call nor the model sets a length."""

# What applies where neither the call nor the file sets an option: Hugging Face's defaults.
_ELSE: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "stop": (),
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "suppress_tokens": (),
    "forced_bos_token_id": None,
    "logit_bias": (),
    "stop_token_ids": (),
    "logprobs": None,
    "prompt_logprobs": False,
    "return_full_text": False,
    "length_penalty": 1.0,
    "early_stopping": False,
}


class GenerationDefaults(GenerationConfig):
    """What a model's files say, and how that completes the options of a call."""

    def resolve(
        self,
        options: GenerateOptions,
        *,
        prompt_tokens: int,
        decoder_only: bool,
        limit: int,
        vocab: int | None = None,
        tokenizer: Tokenizer | None = None,
        like: Resolved | None = None,
    ) -> Resolved:
        """Complete `options`: what they leave open, the model's file sets, else Hugging Face.

        `prompt_tokens` is the prompt's length in tokens. `limit` is the most tokens a sequence of
        the decoder may hold, prompt (`decoder_only`) or start token included; 0: no limit. Token
        ids must be below `vocab`, if it is known; bad words that are text need the `tokenizer`.
        `like` is what the same options have become for another prompt of the model: then only what
        depends on the prompt is found anew.

        The call's own length beats the file's whatever its kind: `max_length` in the call beats
        `max_new_tokens` in the file. A length of the call that does not fit the limit is an
        error; a default that does not fit is cut to what does, as Hugging Face does.

        Raises OptionError when the prompt leaves no room for a token, when a length in the call
        cannot be kept, for an id outside the vocabulary, for more answers than there are beams, or
        several without sampling, for beams beside sampling, for groups of beams that do not fit
        together, for a forced token that is suppressed, and for `return_full_text` where the
        prompt is not the decoder's. An unset seed is drawn from the operating system.
        """
        used = prompt_tokens if decoder_only else 1
        most = self._most_new(options, used, limit)
        least = self._least_new(options, used, most)
        if like is not None:
            return _for_another(like, options, most, least)
        ignore_eos = bool(options.ignore_eos)
        do_sample = _first(options.do_sample, self.options.do_sample, False)
        num_beams = self._beams(options, do_sample)
        resolved = Resolved(
            max_new_tokens=most,
            min_new_tokens=least,
            do_sample=do_sample,
            seed=_seed(options),
            ignore_eos=ignore_eos,
            eos_token_ids=() if ignore_eos else self.eos_token_ids,
            bad_words=self._bad_words(options, tokenizer),
            forced_eos_token_ids=self._either(options, "forced_eos_token_id", ()),
            num_return_sequences=self._answers(options, do_sample, num_beams),
            num_beams=num_beams,
            **self._groups(options, num_beams),
            **{name: self._either(options, name, value) for name, value in _ELSE.items()},
        )
        if not do_sample and options.sampling_asked():
            _warn_once(
                f"{', '.join(options.sampling_asked())}: no effect, as this model does not sample "
                "by default; set do_sample=True to sample"
            )
        if num_beams == 1 and options.beams_asked():
            _warn_once(
                f"{', '.join(options.beams_asked())}: no effect without beams; set num_beams"
            )
        for name in ("return_full_text", "prompt_logprobs"):
            if getattr(resolved, name) and not decoder_only:
                raise OptionError(
                    f"{name} is True; allowed: False, as an encoder-decoder's text does not "
                    "continue the prompt",
                    name,
                )
        resolved.check_ids(vocab)
        return resolved

    def _either(self, options: GenerateOptions, name: str, otherwise: Any) -> Any:
        """The call's value, else the file's, else `otherwise`."""
        given, filed = getattr(options, name), getattr(self.options, name)
        return given if given is not None else otherwise if filed is None else filed

    def _beams(self, options: GenerateOptions, do_sample: bool) -> int:
        """How many beams a prompt gets. A call that samples does without those of the file."""
        if options.num_beams is None:
            return 1 if do_sample else self.num_beams
        if options.num_beams > 1 and do_sample:
            raise OptionError(
                f"num_beams is {options.num_beams}, and {self.source} has do_sample=True; allowed: "
                "num_beams=1, or do_sample=False beside it",
                "num_beams",
            )
        return options.num_beams

    def _groups(self, options: GenerateOptions, num_beams: int) -> dict[str, Any]:
        """How the beams are grouped: `num_beam_groups` and `diversity_penalty`."""
        if num_beams == 1:
            return {}
        groups = self._either(options, "num_beam_groups", 1)
        penalty = self._either(options, "diversity_penalty", 0.0)
        if num_beams % groups:
            where = "" if options.num_beam_groups else f" in {self.source}"
            raise OptionError(
                f"num_beam_groups{where} is {groups}; allowed: what num_beams, {num_beams}, can "
                "be divided by",
                "num_beam_groups",
            )
        if groups > 1 and not penalty:
            raise OptionError(
                f"diversity_penalty is 0, yet num_beam_groups is {groups}; allowed: a number "
                "above 0, as the groups would all find the same",
                "diversity_penalty",
            )
        if penalty and groups == 1:
            raise OptionError(
                f"diversity_penalty is {penalty}, yet num_beam_groups is 1; allowed: "
                "num_beam_groups of at least 2, or no diversity_penalty",
                "diversity_penalty",
            )
        return {"num_beam_groups": groups, "diversity_penalty": penalty}

    def _answers(self, options: GenerateOptions, do_sample: bool, num_beams: int) -> int:
        """How many answers a prompt gets. What the file says counts only where there can be more
        than one: many files that ask for several are made for beams."""
        if do_sample:
            return int(self._either(options, "num_return_sequences", 1))
        wanted = options.num_return_sequences
        if wanted is None:
            return min(self.options.num_return_sequences or 1, num_beams)
        if wanted > num_beams:
            reason = "num_beams" if num_beams > 1 else "as greedy decoding has one answer"
            raise OptionError(
                f"num_return_sequences is {wanted}; allowed: at most {num_beams}, {reason}; set "
                "do_sample=True to sample, or more num_beams",
                "num_return_sequences",
            )
        return wanted

    def _bad_words(
        self, options: GenerateOptions, tokenizer: Tokenizer | None
    ) -> tuple[tuple[int, ...], ...]:
        """The bad words as token ids. As with Hugging Face, an end token alone is none."""
        words: tuple[Word, ...] = self._either(options, "bad_words", ())
        ends = {(token,) for token in self.eos_token_ids}
        ids = [own for word in words for own in _word_ids(word, tokenizer)]
        return tuple(word for word in dict.fromkeys(ids) if word not in ends)

    def _most_new(self, options: GenerateOptions, used: int, limit: int) -> int:
        """How many tokens may be generated after the `used` ones."""
        room = limit - used if limit else None
        if room is not None and room < 1:
            raise OptionError(
                f"the prompt has {used} tokens; allowed: at most {limit - 1}, as the model's limit "
                f"of {limit} tokens includes at least one new token"
            )
        if options.max_new_tokens is not None and options.max_length is not None:
            _warn_once("both max_new_tokens and max_length are set: max_new_tokens counts")
        for given in (options, self.options):
            wanted, name = _length(given.max_new_tokens, given.max_length, used, "max")
            if wanted is None:
                continue
            if wanted < 1:
                where = "" if given is options else f" in {self.source}"
                raise OptionError(
                    f"max_length{where} is {given.max_length}, and {used} tokens are there "
                    f"before the first new one; allowed: at least {used + 1}, or max_new_tokens",
                    "max_length",
                )
            if room is None or wanted <= room:
                return wanted
            if given is options:
                raise OptionError(
                    f"{name} is {getattr(given, name)}, which is {wanted} new tokens; allowed: "
                    f"at most {room} new tokens, as {used} of the model's {limit} are used",
                    name,
                )
            return room
        return DEFAULT_NEW_TOKENS if room is None else min(DEFAULT_NEW_TOKENS, room)

    def _least_new(self, options: GenerateOptions, used: int, most: int) -> int:
        """Before how many tokens no end token may come."""
        for given in (options, self.options):
            wanted, name = _length(given.min_new_tokens, given.min_length, used, "min")
            if wanted is None:
                continue
            if wanted > most and given is options:
                raise OptionError(
                    f"{name} is {getattr(given, name)}, which is {wanted} new tokens; allowed: "
                    f"at most the {most} new tokens that may be generated",
                    name,
                )
            return min(max(wanted, 0), most)
        return 0


def _for_another(like: Resolved, options: GenerateOptions, most: int, least: int) -> Resolved:
    """`like` with other lengths and, if it draws, a seed of its own: mostly `like` itself."""
    seed = _seed(options) if like.do_sample else like.seed
    if (most, least, seed) == (like.max_new_tokens, like.min_new_tokens, like.seed):
        return like
    return replace(like, max_new_tokens=most, min_new_tokens=least, seed=seed)


def _seed(options: GenerateOptions) -> int:
    return secrets.randbits(64) if options.seed is None else options.seed


def _word_ids(word: Word, tokenizer: Tokenizer | None) -> list[tuple[int, ...]]:
    """The token ids of a bad word; of text those at the start of a text, and after a space."""
    if isinstance(word, tuple):
        return [word]
    if tokenizer is None:
        raise OptionError(
            f"bad_words has {word!r}, and the model has no tokenizer; allowed: lists of token ids",
            "bad_words",
        )
    texts = (word, " " + word.lstrip())
    found = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    if not all(0 < len(ids) <= MAX_WORD_TOKENS for ids in found):
        raise OptionError(
            f"bad_words has {word!r}, which is {len(found[0])} tokens; allowed: 1 to "
            f"{MAX_WORD_TOKENS}",
            "bad_words",
        )
    return found


def _length(new: int | None, whole: int | None, used: int, which: str) -> tuple[int | None, str]:
    """A bound in new tokens, and the option that sets it; `new` beats `whole`."""
    if new is not None:
        return new, f"{which}_new_tokens"
    return (None if whole is None else whole - used), f"{which}_length"


def _first(*values: Any) -> Any:
    """The first that is set."""
    return next(value for value in values if value is not None)


@lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
