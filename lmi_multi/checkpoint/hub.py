"""Downloads a checkpoint's files from the Hugging Face Hub, or finds them in its cache.

HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are honoured by huggingface_hub itself.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from lmi_multi.checkpoint.files import BIN_FILES, SIDE_FILES, WEIGHT_FILES, matching, plain_name
from lmi_multi.errors import CapacityError, CheckpointError

_SUBFOLDERS = "*/*"


def download(repo: str, revision: str | None) -> Path:
    """The folder with `repo`'s config, tokenizer and weights; its name is the commit.

    `.bin` weights are fetched only where there are no safetensors. Raises CheckpointError in one
    line: not found, gated, unknown revision, or offline and not cached.
    """
    folder = _snapshot(repo, revision, (*SIDE_FILES, *WEIGHT_FILES))
    if not matching(folder, WEIGHT_FILES):
        folder = _snapshot(repo, folder.name, (*SIDE_FILES, *BIN_FILES))
    return folder


def _snapshot(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=[_SUBFOLDERS, "*.py"],
        )
    except Exception as error:  # network libraries raise their own kinds below the Hub's
        raise _translate(error, repo, revision) from None
    return Path(folder)


def is_offline() -> bool:
    """Whether the Hub is not to be asked: then its cache is all there is."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def list_files(repo: str, revision: str | None) -> tuple[str, list[str]]:
    """The commit that `revision` means, and the names of the files at the top of `repo`.

    Raises CheckpointError as `download` does.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repo, revision=revision)
    except Exception as error:  # network libraries raise their own kinds below the Hub's
        raise _translate(error, repo, revision) from None
    names = [item.rfilename for item in info.siblings or ()]
    return str(info.sha), [name for name in names if plain_name(name)]


def read_range(repo: str, commit: str, name: str, start: int, stop: int) -> tuple[bytes, int]:
    """The bytes [start, stop) of a file, as far as it reaches, and the file's size in bytes.

    Raises CheckpointError as `download` does.
    """
    from huggingface_hub import hf_hub_url, utils

    tools: Any = utils  # whose type hints hide what it re-exports
    url = hf_hub_url(repo, name, revision=commit)
    headers = tools.build_hf_headers() | {"range": f"bytes={start}-{stop - 1}"}
    try:
        answer = tools.get_session().get(url, headers=headers, timeout=30)
        tools.hf_raise_for_status(answer)
    except Exception as error:  # network libraries raise their own kinds below the Hub's
        raise _translate(error, repo, commit) from None
    data: bytes = answer.content
    told = answer.headers.get("content-range", "").rpartition("/")[2]
    if answer.status_code != 206 or not told.isdecimal():  # the server sent the whole file
        return data[start:stop], len(data)
    return data, int(told)


def _translate(error: Exception, repo: str, revision: str | None) -> Exception:
    """One line for each way in which a download fails."""
    from huggingface_hub import constants, errors

    at = f"revision {revision!r} of {repo}" if revision else repo
    if isinstance(error, errors.HFValidationError):
        return CheckpointError(
            f"{repo!r} is neither a local folder nor a Hub id (NAME or OWNER/NAME)"
        )
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{repo} is gated on the Hub: accept its terms there and set HF_TOKEN to a token of "
            "that account"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(f"{repo} has no revision {revision!r} on the Hub")
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{repo} is neither a local folder nor a model on the Hub "
            "(a private one needs HF_TOKEN)"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CapacityError(f"the disk of {constants.HF_HUB_CACHE} filled up downloading {repo}")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        return CheckpointError(
            f"{at} is no local folder and not (wholly) in the Hub cache "
            f"{constants.HF_HUB_CACHE}, and {why}"
        )
    reason = (str(error).strip().splitlines() or [""])[0]
    return CheckpointError(
        f"{at} is no local folder and could not be fetched from the Hub: "
        f"{type(error).__name__}: {reason:.200}"
    )
