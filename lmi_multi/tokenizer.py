"""A model's tokenizer, read from its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from lmi_multi.errors import CheckpointError

# Each of these is a whole vocabulary; the others need a second file, or none as ByT5's.
_WHOLE = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
FILES = (*_WHOLE, "tokenizer_config.json", "vocab.json", "vocab.txt")
"""One of these makes a folder one with a tokenizer."""


@runtime_checkable
class Tokenizer(Protocol):
    """What this package needs of a tokenizer; those of transformers have it."""

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of end, pad and other tokens that are not text."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the special tokens that the tokenizer itself adds."""

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """The text of `token_ids`."""

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        """The vocabulary's own name of a token; None for an unknown id."""


def text_of(tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The text of `ids`, as the model said it: no spaces are cleaned up.

    Ids that the tokenizer has no token for add nothing: a vocabulary may be padded with rows that
    sampling can reach, and some tokenizers refuse these.
    """
    try:
        return _decode(tokenizer, ids, skip_special_tokens)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        known = [token for token in ids if _decodes(tokenizer, token)]
        return _decode(tokenizer, known, skip_special_tokens)


def _decode(tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool) -> str:
    return tokenizer.decode(
        ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


def _decodes(tokenizer: Tokenizer, token: int) -> bool:
    try:
        _decode(tokenizer, [token], False)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return False
    return True


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds a tokenizer's files."""
    return any((folder / name).is_file() for name in FILES)


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in `folder`, or None when the folder has none.

    Nothing is downloaded, and no code out of the folder is run. The tokenizer does not warn of
    texts beyond its `model_max_length`: the length of a prompt is checked against the model.

    Raises CheckpointError, naming folder and cause, when the files do not make a tokenizer.
    """
    if not has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer  # takes seconds: only where there is a tokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in tokenizers' Rust code is no Exception
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {cause}") from error
    _check_vocabulary(folder, tokenizer)
    # The flag by which transformers remembers that it has warned.
    warned = getattr(tokenizer, "deprecation_warnings", {})
    warned["sequence-length-is-longer-than-the-specified-maximum"] = True
    return cast(Tokenizer, tokenizer)


def _check_vocabulary(folder: Path, tokenizer: Any) -> None:
    """Without its vocabulary files transformers makes a tokenizer that knows no word."""
    if any((folder / name).is_file() for name in _WHOLE):
        return
    kinds: dict[str, str] = getattr(tokenizer, "vocab_files_names", {})
    needed = [name for kind, name in kinds.items() if kind != "tokenizer_file"]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: its tokenizer is a {type(tokenizer).__name__} without a vocabulary: "
            f"tokenizer.json, or {' and '.join(missing)}, is missing"
        )
