"""Conversations as prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmi_multi.errors import OptionError
from lmi_multi.prompts import check_text
from lmi_multi.tokenizer import Tokenizer


def render(tokenizer: Tokenizer | None, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of a conversation, up to where the assistant's answer begins.

    transformers renders the template in jinja2's immutable sandbox. Raises OptionError if there
    is no template, if a message lacks role or content, or if the template refuses them.
    """
    template = getattr(tokenizer, "chat_template", None)
    if tokenizer is None or template is None:
        raise OptionError("the model's tokenizer has no chat template: use generate")
    if isinstance(messages, str) or not messages:
        raise OptionError("messages must be a list of at least one mapping with role and content")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise OptionError(f"message {index} must be a mapping with role and content")
    try:
        text = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a template may raise anything
        cause = " ".join(str(error).split()) or type(error).__name__
        raise OptionError(f"the chat template refuses the messages: {cause}") from None
    check_text(text, "the conversation")
    # The template writes the special tokens itself.
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
