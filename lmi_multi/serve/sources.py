"""Where a server's settings come from: which file is read, and what its relative names mean."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from lmi_multi.errors import OptionError
from lmi_multi.serve import names, properties
from lmi_multi.serve.names import DJL_PACKAGE, Given, shown

log = logging.getLogger(__name__)

MODEL_FOLDER = Path("/opt/ml/model")
"""Where SageMaker puts the model that an endpoint names."""
FILE = "serving.properties"
HANDLER = "model.py"
MAX_KEY_BYTES = 4096


def gather(
    command_line: Mapping[str, object],
    file: Path | None,
    environ: Mapping[str, str],
    folder: Path | None = None,
) -> dict[str, Given]:
    """What was given for each field of the settings, each from the source that counts first.

    `folder` is the model's own, where it is known: its file is read, and it is the model if nothing
    names another.
    """
    asked = names.of_command_line(command_line)
    variables = names.of_environment(environ)
    found = file or _find(asked, variables, folder)
    listed = names.of_file(properties.read(found)) if found else {}
    given = variables | listed | asked
    if folder is not None:
        given.setdefault("model", Given("model", str(folder)))
    model = _model(given, found)
    if model is not None:
        given["model"] = model
    if "entry_point" in given:
        # Each source names the script from where it stands itself.
        if "entry_point" in asked:
            base = Path()
        elif "entry_point" in listed and found:
            base = found.parent
        else:
            base = _folder(model) or MODEL_FOLDER
        given["entry_point"] = _script(given["entry_point"], base)
    _say_what_is_not_read(given, found)
    return _with_key(given)


def _find(
    asked: Mapping[str, Given], variables: Mapping[str, Given], folder: Path | None
) -> Path | None:
    """The serving.properties of the model's folder, if there is one."""
    folders: list[Path | None]
    if folder is not None:
        folders = [folder]
    elif "model" in asked:
        folders = [_folder(asked["model"])]
    else:
        folders = [MODEL_FOLDER, _folder(variables.get("model"))]
    files = (folder / FILE for folder in folders if folder is not None)
    return next((file for file in files if file.is_file()), None)


def _model(given: Mapping[str, Given], file: Path | None) -> Given | None:
    """The model that is named, else the one in SageMaker's folder, else the file's neighbour; none
    where requests name the models."""
    if "model" in given:
        return given["model"]
    several = given.get("multi_model")
    if several is not None and str(several.value).strip().casefold() in ("true", "1"):
        return None
    if MODEL_FOLDER.is_dir():
        return Given("model", str(MODEL_FOLDER))
    # As with DJL: a file that names no model lies in the model's folder.
    return Given("model", str(file.parent)) if file else None


def _folder(model: Given | None) -> Path | None:
    """The local folder that a model's name stands for, if it does."""
    text = str(model.value).strip() if model else ""
    try:
        path = Path(text).expanduser()
        return path if text and path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # no path at all: the model's loading says so
        return None


def _script(given: Given, base: Path) -> Given:
    """A script that exists, as a path from anywhere; DJL's own handlers stay as they are."""
    text = str(given.value).strip()
    if text.startswith(DJL_PACKAGE) or not text.endswith(".py"):
        return given
    path = (base / Path(text).expanduser()).absolute()
    if not path.is_file():
        raise OptionError(
            f"{given.label} is {shown(given.value)}; allowed: a Python file, but {path} is none"
        )
    return Given(given.label, path)


def _say_what_is_not_read(given: Mapping[str, Given], file: Path | None) -> None:
    folder = _folder(given.get("model"))
    if folder is None:
        return
    beside = folder / FILE
    if beside.is_file() and not (file and beside.samefile(file)):
        log.warning("%s is not read: %s is", beside, file)
    if (folder / HANDLER).is_file() and "entry_point" not in given:
        log.warning(
            "%s is not run: only a script that option.entryPoint names is", folder / HANDLER
        )


def _with_key(given: dict[str, Given]) -> dict[str, Given]:
    """The API key's file replaced by what it holds."""
    file = given.pop("api_key_file", None)
    if file is None:
        return given
    if "api_key" in given:
        raise OptionError(
            f"{file.label} is {shown(file.value)}, yet {given['api_key'].label} is set; "
            "allowed: one of them"
        )
    try:
        with Path(str(file.value).strip()).expanduser().open("rb") as opened:
            key = opened.read(MAX_KEY_BYTES + 2).decode("ascii", "replace").strip()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(
            f"{file.label} is {shown(file.value)}; allowed: a file that holds the key ({reason})"
        ) from None
    return given | {"api_key": Given(file.label, key)}
