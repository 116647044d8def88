"""`init_inference` and `save_checkpoint`: what they open, write and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer

import lmi_multi
from lmi_multi import fastertransformer as ft
from lmi_multi.errors import OptionError
from tests.checkpoint.ft_writer import write
from tests.families import FAMILIES

from .tiny import PROMPTS, VOCAB, opened


@pytest.fixture(scope="module", params=["t5", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"use_triton": True}, "use_triton is set"),
        ({"is_peft": True}, "is_peft is set"),
        ({"pipeline_parallel_degree": 0}, "pipeline_parallel_degree is 0, must be"),
        ({"tensor_parallel_degree": "2"}, "tensor_parallel_degree is '2', must be"),
        ({"tensor_parallel_degree": True}, "tensor_parallel_degree is True, must be"),
        ({"dtype": "int4"}, "dtype is 'int4', must be one of fp32, fp16, bf16, int8"),
    ],
)
def test_refused_arguments(
    given: dict[str, Any], match: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    first = {"tensor_parallel_degree": 1, "pipeline_parallel_degree": 1}
    with pytest.raises(OptionError, match=match):
        ft.init_inference(folders["gpt2"], **(first | given))
    with pytest.raises(OptionError, match=match):
        ft.save_checkpoint(
            folders["gpt2"], save_mp_checkpoint_path=tmp_path / "out", **(first | given)
        )
    assert not (tmp_path / "out").exists()


def test_do_streaming_is_a_switch(folders: dict[str, Path]) -> None:
    with opened(folders["gpt2"], do_streaming=True, lib_path="/opt", use_triton=False) as handle:
        assert isinstance(handle, ft.GPTModel)
    with pytest.raises(OptionError, match="do_streaming is 'yes'"):
        opened(folders["gpt2"], do_streaming="yes")


def test_encoders_generate_nothing(tmp_path: Path) -> None:
    FAMILIES["bert"].save(tmp_path)
    with pytest.raises(OptionError, match="model is a bert"):
        opened(tmp_path)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_saved_checkpoints_load(
    family: str, dtype: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    ft.save_checkpoint(str(folders[family]), 2, 1, str(saved), dtype, num_convert_process=4)
    assert lmi_multi.checkpoint.artifact.Artifact.open(saved).tensor_parallel == 2
    direct = ft.init_inference(folders[family], 1, 1, dtype, backend="cpu")
    with direct, ft.init_inference(saved, 1, 1, dtype, backend="cpu") as loaded:
        narrow = {"fp32": "fp32", "bf16": "bf16", "int8": "bf16" if family == "t5" else "fp16"}
        assert loaded.model.artifact.dtype == narrow[dtype]
        assert loaded.model.artifact.quantize == ("int8" if dtype == "int8" else None)
        expected = direct.pipeline_generate(PROMPTS, top_k=0)
        assert loaded.pipeline_generate(PROMPTS, top_k=0) == expected


def test_another_dtype_than_saved_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    ft.save_checkpoint(folders["gpt2"], 1, 1, tmp_path / "saved", "fp16")
    with pytest.raises(OptionError, match="dtype is 'fp32', but the artifact"):
        opened(tmp_path / "saved")


def test_fastertransformers_own_files(
    family: str, folders: dict[str, Path], t5: ft.T5Model, gpt: ft.GPTModel, tmp_path: Path
) -> None:
    write(FAMILIES[family].build(vocab=VOCAB), tmp_path, gpus=2)
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path)
    expected = (t5 if family == "t5" else gpt).pipeline_generate(PROMPTS)
    with opened(tmp_path) as handle:
        assert handle.pipeline_generate(PROMPTS) == expected


def test_without_a_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    FAMILIES["gpt2"].save(tmp_path / "gpt2")
    with opened(tmp_path / "gpt2") as handle:
        with pytest.raises(OptionError, match="has no tokenizer"):
            handle.pipeline_generate([[5, 6]])
        [text] = handle.pipeline_generate([[5, 6]], detokenize=False, output_len=4)
        assert all(part.isdigit() for part in text.split())
    FAMILIES["t5"].save(tmp_path / "t5")
    with opened(tmp_path / "t5") as handle, pytest.raises(OptionError, match="no tokenizer"):
        handle.pipeline_generate([[5, 6]])
