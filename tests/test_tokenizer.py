"""Tokenizers read from folders: whole, absent and broken."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from lmi_multi.errors import CheckpointError
from lmi_multi.tokenizer import Tokenizer, has_tokenizer, load_tokenizer, text_of

BYT5 = {"tokenizer_class": "ByT5Tokenizer"}
T5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
    return folder


def words(folder: Path, **keywords: Any) -> Path:
    """A tokenizer of three words that ends texts with </s>."""
    backend = Backend(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", **keywords
    ).save_pretrained(folder)
    return folder


def test_no_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    write(tmp_path, {"config.json": T5, "generation_config.json": {}, "model.safetensors": ""})
    assert not has_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path) is None


def test_no_tokenizer_costs_no_import(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, lmi_multi.tokenizer as t; "
        "assert t.load_tokenizer(pathlib.Path(sys.argv[1])) is None; "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], timeout=120).returncode == 0


@pytest.mark.parametrize("config", [{}, {"config.json": T5}])
def test_byt5_needs_no_vocabulary_file(tmp_path: Path, config: dict[str, Any]) -> None:
    made = load_tokenizer(write(tmp_path, {"tokenizer_config.json": BYT5, **config}))
    assert isinstance(made, ByT5Tokenizer) and isinstance(made, Tokenizer)
    assert made.encode("hé") == [3 + 0x68, 3 + 0xC3, 3 + 0xA9, 1]
    assert made.decode([3 + 0x68, 1], skip_special_tokens=True) == "h"


def test_saved_tokenizers_come_back(tmp_path: Path) -> None:
    made = load_tokenizer(words(tmp_path))
    assert isinstance(made, Tokenizer)
    assert made.encode("b a zz") == [3, 2, 0, 1]
    assert set(made.all_special_ids) == {0, 1}
    assert made.convert_ids_to_tokens(2) == "a"


def test_tokenizer_json_alone(tmp_path: Path) -> None:
    words(tmp_path)
    for path in tmp_path.iterdir():
        if path.name != "tokenizer.json":
            path.unlink()
    made = load_tokenizer(tmp_path)
    assert made is not None and made.encode("a b") == [2, 3, 1]


def test_long_texts_raise_no_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = load_tokenizer(words(tmp_path, model_max_length=4))
    assert made is not None
    capfd.readouterr()
    assert len(made.encode("a " * 50)) == 51
    assert "sequence length" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("files", "cause"),
    [
        ({"tokenizer_config.json": "{"}, "line 1"),
        ({"tokenizer.json": "{}"}, ""),
        ({"tokenizer.json": '{"trunc'}, ""),
        ({"tokenizer_config.json": {"tokenizer_class": "NoSuchTokenizer"}}, ""),
        ({"tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"}}, "spiece.model"),
        ({"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}}, "merges.txt"),
        ({"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}}, "tokenizer.model"),
        ({"vocab.json": {"a": 0}, "config.json": {"model_type": "gpt2"}}, "merges"),
        ({"spiece.model": "no model"}, ""),
        (
            {
                "tokenizer_config.json": {
                    "tokenizer_class": "Mine",
                    "auto_map": {"AutoTokenizer": ["mine.Mine", None]},
                },
                "mine.py": "raise SystemExit('this code ran')",
            },
            "",
        ),
    ],
)
def test_broken_tokenizers_name_folder_and_cause(
    tmp_path: Path, files: dict[str, Any], cause: str
) -> None:
    write(tmp_path, {"config.json": T5} | files)
    logging.disable(logging.WARNING)
    try:
        with pytest.raises(CheckpointError) as caught:
            load_tokenizer(tmp_path)
    finally:
        logging.disable(logging.NOTSET)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: its tokenizer") and cause in message
    assert "\n" not in message and "this code ran" not in message


def test_ids_without_a_token_add_no_text(tmp_path: Path) -> None:
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    ids = tokenizer.encode("whole")
    assert text_of(tokenizer, [300, *ids[:2], 319, *ids[2:]]) == "whole"
