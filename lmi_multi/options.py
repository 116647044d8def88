"""What a caller may ask of `generate`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)

from lmi_multi import values
from lmi_multi.errors import OptionError
from lmi_multi.values import (
    MAX_BIAS,
    MAX_IDS,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_WORD_TOKENS,
    MAX_WORDS,
    Float,
    Int,
)

MAX_LOGPROBS = 20
"""The most alternatives whose log-probabilities one prompt may ask for."""
MAX_RETURN_SEQUENCES = 16
"""The most answers that one prompt may have."""
MAX_BEAMS = 16
"""The most beams that one prompt may have."""
MAX_LENGTH_PENALTY = 10.0
"""The largest length penalty, up or down: what is beyond it could leave float32's range."""
MAX_DIVERSITY_PENALTY = 100.0
PENALTIES = (0.01, 100.0)
"""The range of the two repetition penalties: what is beyond it would leave float32's."""

# Names under which other libraries know an option, where the spelling alone does not tell.
_OTHER_NAMES = {
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "stop_words": "stop",
    "random_seed": "seed",
    "sampling": "do_sample",
    "n": "num_return_sequences",
    "sequence_bias": "logit_bias",
    "bad_words_ids": "bad_words",
}
# Hugging Face's defaults: setting a sampling option to one of them asks for nothing.
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "temperature": (1.0,),
    "top_k": (0, 50),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
}
# The same for the options of beam search.
_NEUTRAL_BEAMS: dict[str, tuple[Any, ...]] = {
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
}
_PENALTY = f"a number from {PENALTIES[0]} to {PENALTIES[1]:.0f} (1: off)"
_IDS = f"a list of up to {MAX_IDS} token ids"

_Penalty = Annotated[Float, Field(ge=PENALTIES[0], le=PENALTIES[1], allow_inf_nan=False)]
_Additive = Annotated[Float, Field(ge=-2, le=2, allow_inf_nan=False)]
_LengthPenalty = Annotated[
    Float, Field(ge=-MAX_LENGTH_PENALTY, le=MAX_LENGTH_PENALTY, allow_inf_nan=False)
]
_Diversity = Annotated[Float, Field(ge=0, le=MAX_DIVERSITY_PENALTY, allow_inf_nan=False)]
_Strings = Annotated[tuple[str, ...] | None, values.optional(values.strings)]
_Words = Annotated[tuple[values.Word, ...] | None, values.optional(values.words)]
_Ids = Annotated[tuple[int, ...] | None, values.optional(values.token_ids)]
_OneOrMore = Annotated[tuple[int, ...] | None, values.optional(values.one_or_more_ids)]
_Id = Annotated[int | None, values.optional(values.token_id)]
_Bias = Annotated[values.Bias | None, values.optional(values.bias)]


class GenerateOptions(BaseModel):
    """How to generate: names, ranges and meaning are Hugging Face's. `None`: the model's default.

    The model's default is what its generation_config.json says, else Hugging Face's own.

    - `max_new_tokens`: at most so many tokens are generated. Beats `max_length`, which for a
      decoder-only model counts the prompt too, for an encoder-decoder the decoder's start token.
    - `min_new_tokens`: so many tokens come before an end token may. Beats `min_length`, which
      counts as `max_length` does.
    - `do_sample`: draw tokens instead of taking the likeliest. `temperature` > 0 divides the
      logits, `top_k` keeps the k likeliest (0: all), `top_p` in (0, 1] the smallest set of the
      likeliest tokens whose probabilities reach it. With `do_sample=False` in the same options
      a sampling option other than the default is an error; where `do_sample` is unset and the
      model's default is greedy, it is logged, and decoding stays greedy, as with Hugging Face.
    - `min_p` in [0, 1] keeps tokens at least `min_p` times as likely as the likeliest (0: all);
      `typical_p` in (0, 1] the smallest set of tokens, those of nearly the expected information
      first, whose probabilities reach it. They come after top-p, in this order.
    - `repetition_penalty` above 1 makes tokens less likely that are in the prompt (decoder-only)
      or were generated: their logits are divided by it, negative ones multiplied.
      `encoder_repetition_penalty` above 1 does the reverse for the tokens of the prompt.
      Padding is never penalised, as there is none; an encoder-decoder's start token counts as a
      generated one, also where it has the padding token's id.
    - `presence_penalty` is subtracted from the logits of tokens that were generated, and
      `frequency_penalty` once for each time they were; -2 to 2, as with OpenAI.
    - `no_repeat_ngram_size`: no n-gram of this size comes twice (0: off), the prompt of a
      decoder-only model included.
    - `bad_words`: strings, or lists of token ids, whose last token never follows the others. A
      string stands for its tokens both at the start of a text and after a space. Those of a
      single token that is an end token are ignored.
    - `suppress_tokens`: ids that are never drawn, not even where they are forced.
    - `forced_bos_token_id`: the token that follows an encoder-decoder's start token, or the
      prompt of a decoder-only model where that is a single token. `forced_eos_token_id`: the
      last one when `max_new_tokens` is reached; of several ids greedy decoding takes the lowest.
    - `logit_bias`: token ids and what is added to their logits before all else, -100 to 100.
    - `seed`: 0 to 2**64 - 1; the same seed gives the same tokens in any batch. `None`: random.
    - `ignore_eos`: an end token is generated like any other and ends nothing.
    - `stop`: one string or up to 16, each of up to 1024 characters; generation ends as soon as the
      text holds one of them.
    - `stop_token_ids`: they end generation as end tokens do, `ignore_eos` or not, but with the
      finish reason "stop".
    - `logprobs`: the log-probability of every generated token and of so many likeliest ones
      beside it (0: of none), 0 to 20. They are the model's own: nothing of the above, and no
      temperature, is in them.
    - `prompt_logprobs`: the log-probability of every prompt token but the first as well.
      Decoder-only models; not while streaming.
    - `return_full_text`: the text begins with the prompt. Decoder-only models.
    - `num_return_sequences`: so many answers to the prompt, 1 to 16; more than one needs
      `do_sample`, or as many beams.
    - `num_beams`: beam search with so many beams, 1 to 16; not beside `do_sample` or an option of
      sampling. Its answers come best first. A score is the sum of a beam's log-probabilities
      over its length ** `length_penalty` (-10 to 10). `early_stopping` False stops when a better
      answer is unlikely, True as soon as `num_beams` answers are found, "never" only when there
      can be no better one.
    - `num_beam_groups`: diverse beams, in so many groups of equal size, of which each avoids the
      tokens that those before it take in the same step: `diversity_penalty` is subtracted from
      their scores, once for each beam that takes one, after all other penalties.

    Raises OptionError, one line, for an unknown name or a value that is not allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: Annotated[Int, Field(ge=1)] | None = Field(
        default=None, description="an integer, at least 1"
    )
    max_length: Annotated[Int, Field(ge=1)] | None = Field(
        default=None, description="an integer, at least 1"
    )
    min_new_tokens: Annotated[Int, Field(ge=0)] | None = Field(
        default=None, description="an integer, at least 0"
    )
    min_length: Annotated[Int, Field(ge=0)] | None = Field(
        default=None, description="an integer, at least 0"
    )
    do_sample: StrictBool | None = Field(default=None, description="True or False")
    temperature: Annotated[Float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="a finite number above 0 (for greedy decoding: do_sample=False)"
    )
    top_k: Annotated[Int, Field(ge=0, lt=2**63)] | None = Field(
        default=None, description="an integer from 0 (off) to 2**63 - 1"
    )
    top_p: Annotated[Float, Field(gt=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None, description="a number above 0 and at most 1"
    )
    seed: Annotated[Int, Field(ge=0, lt=2**64)] | None = Field(
        default=None, description="an integer from 0 to 2**64 - 1"
    )
    ignore_eos: StrictBool | None = Field(default=None, description="True or False")
    stop: _Strings = Field(
        default=None,
        description=f"a string of 1 to {MAX_STOP_CHARACTERS} characters, or a list of up to "
        f"{MAX_STOPS} of them",
    )
    min_p: Annotated[Float, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None, description="a number from 0 to 1 (0: off)"
    )
    typical_p: Annotated[Float, Field(gt=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None, description="a number above 0 and at most 1 (1: off)"
    )
    repetition_penalty: _Penalty | None = Field(default=None, description=_PENALTY)
    encoder_repetition_penalty: _Penalty | None = Field(default=None, description=_PENALTY)
    presence_penalty: _Additive | None = Field(default=None, description="a number from -2 to 2")
    frequency_penalty: _Additive | None = Field(default=None, description="a number from -2 to 2")
    no_repeat_ngram_size: Annotated[Int, Field(ge=0)] | None = Field(
        default=None, description="an integer, at least 0 (0: off)"
    )
    bad_words: _Words = Field(
        default=None,
        description=f"a list of up to {MAX_WORDS} strings, or lists of 1 to {MAX_WORD_TOKENS} "
        "token ids",
    )
    suppress_tokens: _Ids = Field(default=None, description=_IDS)
    forced_bos_token_id: _Id = Field(default=None, description="a token id")
    forced_eos_token_id: _OneOrMore = Field(default=None, description="a token id, or a list")
    logit_bias: _Bias = Field(
        default=None,
        description=f"a mapping of up to {MAX_IDS} token ids to numbers from -{MAX_BIAS:.0f} "
        f"to {MAX_BIAS:.0f}",
    )
    stop_token_ids: _Ids = Field(default=None, description=_IDS)
    logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        default=None, description=f"an integer from 0 to {MAX_LOGPROBS}"
    )
    prompt_logprobs: StrictBool | None = Field(default=None, description="True or False")
    return_full_text: StrictBool | None = Field(default=None, description="True or False")
    num_return_sequences: Annotated[Int, Field(ge=1, le=MAX_RETURN_SEQUENCES)] | None = Field(
        default=None, description=f"an integer from 1 to {MAX_RETURN_SEQUENCES}"
    )
    num_beams: Annotated[Int, Field(ge=1, le=MAX_BEAMS)] | None = Field(
        default=None, description=f"an integer from 1 to {MAX_BEAMS}"
    )
    length_penalty: _LengthPenalty | None = Field(
        default=None,
        description=f"a number from -{MAX_LENGTH_PENALTY:.0f} to {MAX_LENGTH_PENALTY:.0f}",
    )
    early_stopping: StrictBool | Literal["never"] | None = Field(
        default=None, description='True, False or "never"'
    )
    num_beam_groups: Annotated[Int, Field(ge=1, le=MAX_BEAMS)] | None = Field(
        default=None, description=f"an integer from 1 to {MAX_BEAMS}"
    )
    diversity_penalty: _Diversity | None = Field(
        default=None, description=f"a number from 0 to {MAX_DIVERSITY_PENALTY:.0f}"
    )

    if not TYPE_CHECKING:  # type checkers see the fields as keywords

        def __init__(self, **fields: Any) -> None:
            # Before anything else: pydantic would list every one, and there may be a million.
            for name in fields:
                if name not in type(self).model_fields:
                    raise _unknown(name)
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise _judged(error) from None

    @model_validator(mode="after")
    def _no_sampling_while_greedy(self) -> GenerateOptions:
        asked = self.sampling_asked()
        if self.do_sample is False and asked:
            raise OptionError(
                f"do_sample is False, yet {asked[0]} is {getattr(self, asked[0])!r}; "
                f"allowed: do_sample=True, or no {asked[0]}",
                asked[0],
            )
        return self

    @model_validator(mode="after")
    def _either_beams_or_sampling(self) -> GenerateOptions:
        if (self.num_beams or 1) == 1:
            return self
        asked = ["do_sample"] if self.do_sample else self.sampling_asked()
        if asked:
            raise OptionError(
                f"{asked[0]} is {getattr(self, asked[0])!r}, yet num_beams is {self.num_beams}; "
                f"allowed: num_beams=1, or no {asked[0]}",
                asked[0],
            )
        return self

    @model_validator(mode="after")
    def _no_beam_options_without_beams(self) -> GenerateOptions:
        asked = self.beams_asked()
        if self.num_beams == 1 and asked:
            raise OptionError(
                f"{asked[0]} is {getattr(self, asked[0])!r}, yet num_beams is 1; allowed: "
                f"num_beams of at least 2, or no {asked[0]}",
                asked[0],
            )
        return self

    def sampling_asked(self) -> list[str]:
        """The sampling options set here to something other than Hugging Face's default."""
        return self._asked(_NEUTRAL)

    def beams_asked(self) -> list[str]:
        """The options of beam search set here to something other than Hugging Face's default."""
        return self._asked(_NEUTRAL_BEAMS)

    def _asked(self, neutral: Mapping[str, tuple[Any, ...]]) -> list[str]:
        values = {name: getattr(self, name) for name in neutral}
        return [n for n, value in values.items() if value is not None and value not in neutral[n]]

    def given(self) -> dict[str, Any]:
        """The options that are set, by name."""
        return {name: value for name, value in self if value is not None}

    @classmethod
    def of(
        cls, options: GenerateOptions | Mapping[str, Any] | None = None, **keywords: Any
    ) -> GenerateOptions:
        """Options from an object, a mapping or nothing; keywords that are not None win over it.

        Raises OptionError for an invalid option, or when `options` is of another type.
        """
        keywords = {name: value for name, value in keywords.items() if value is not None}
        if isinstance(options, GenerateOptions):
            return cls(**(options.given() | keywords)) if keywords else options
        if options is None:
            return cls(**keywords)
        if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
            raise OptionError(
                f"options is {_short(options)}; allowed: GenerateOptions, or a mapping from "
                "option names to values"
            )
        return cls(**(dict(options) | keywords))


def per_prompt(
    options: GenerateOptions
    | Mapping[str, Any]
    | Sequence[GenerateOptions | Mapping[str, Any] | None]
    | None,
    count: int,
    keywords: Mapping[str, Any],
) -> list[GenerateOptions]:
    """One `GenerateOptions` for each of `count` prompts; `keywords` win over every one of them.

    `options` is one for all, or a sequence with one for each prompt. Raises OptionError
    when their number is not `count`, or when one is invalid.
    """
    if not isinstance(options, Sequence) or isinstance(options, str):
        return [GenerateOptions.of(options, **keywords)] * count
    if len(options) != count:
        raise OptionError(
            f"options has {len(options)} entries for {count} prompts; allowed: one for all, "
            "or one for each prompt"
        )
    return [GenerateOptions.of(one, **keywords) for one in options]


def _judged(error: ValidationError) -> OptionError:
    """The first failure as one line: field, value, what is allowed."""
    first = error.errors()[0]
    if not first["loc"]:  # a rule over several fields words its own message
        found = first["ctx"]["error"]
        return OptionError(str(found), getattr(found, "option", None))
    name = str(first["loc"][0])
    # An element of a list is judged with the list: the caller gave the list.
    given, allowed = _short(first["input"]), GenerateOptions.model_fields[name].description
    return OptionError(f"{name} is {given}; allowed: {allowed}", name)


def _unknown(name: str) -> OptionError:
    """The error of an option that there is not; it names the nearest one that there is."""
    known = GenerateOptions.model_fields
    close = difflib.get_close_matches(name[:80], known, 1)
    near = _OTHER_NAMES.get(name) or next(iter(close), None)
    guess = f"; did you mean {near!r}?" if near else ";"
    message = f"unknown option {_short(name)}{guess} known: {', '.join(known)}"
    return OptionError(message, name[:80])


def _short(value: object) -> str:
    """`repr` on one line, cut where it gets long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a foreign object's own repr must not hide our message
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
