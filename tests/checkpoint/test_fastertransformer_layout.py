"""FasterTransformer's files: the same network as from Hugging Face's, or a clear refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import lmi_multi
from lmi_multi.checkpoint.artifact import Artifact
from lmi_multi.checkpoint.convert import convert
from lmi_multi.checkpoint.fastertransformer import FasterTransformerReader
from lmi_multi.checkpoint.inspect import describe
from lmi_multi.checkpoint.source import fingerprint
from lmi_multi.errors import CheckpointError, UnsupportedModelError
from tests.checkpoint.ft_writer import write
from tests.families import FAMILIES

PROMPTS = [[5, 9, 17, 33], [4], [60, 61, 62, 63, 64, 65, 66]]
EXACT = ["t5", "t5-gated-untied", "mt5", "gpt2", "opt", "bloom-12-heads", "gptj", "gptneox"]


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    """A fresh T5 for two GPUs that the test may break."""
    return write(FAMILIES["t5"].build(), tmp_path / "t5", gpus=2)


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A fresh GPT-2 for two GPUs that the test may break."""
    return write(FAMILIES["gpt2"].build(), tmp_path / "gpt2", gpus=2)


def edit(folder: Path, old: str, new: str) -> None:
    """Replace every `old` of the settings, which must be there."""
    path = folder / "config.ini"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def greedy(folder: Path) -> list[list[int]]:
    with lmi_multi.load(folder, backend="cpu", dtype="fp32", max_tokens=40) as model:
        return [c.token_ids for c in model.generate(PROMPTS, max_new_tokens=12, ignore_eos=True)]


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("family", EXACT)
def test_the_artifact_is_that_of_hugging_faces_files(
    family: str, gpus: int, tmp_path: Path
) -> None:
    model = FAMILIES[family].save(tmp_path / "hf")
    folder = write(model, tmp_path / "ft", gpus)
    expected = convert(tmp_path / "hf", tmp_path / "expected")
    actual = convert(folder, tmp_path / "actual")
    # Nothing in the files of the two rotary networks tells how far they reach.
    reach = 2048 if family in ("gptj", "gptneox") else expected.spec.max_positions
    assert actual.spec == replace(expected.spec, max_positions=reach)
    theirs, ours = expected.load_rank(0, 1), actual.load_rank(0, 1)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        # Biases that were stored divided by the number of GPUs: powers of two are exact.
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("family", ["t5", "t5-gated-untied", "gpt2"])
def test_tokens_and_scores_are_those_of_hugging_faces_files(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family].save(tmp_path / "hf")
    folder = write(model, tmp_path / "ft", gpus=2)
    results = []
    for source in (tmp_path / "hf", folder):
        with lmi_multi.load(source, backend="cpu", dtype="fp32", max_tokens=40) as loaded:
            answers = loaded.generate(PROMPTS, max_new_tokens=12, ignore_eos=True)
            ids = [answer.token_ids for answer in answers]
            results.append((ids, loaded.score(PROMPTS, ids)))
    assert results[0][0] == results[1][0]
    for left, right in zip(results[0][1], results[1][1], strict=True):
        assert np.array_equal(left, right)


def test_opt_350m_whose_projections_were_multiplied_in(tmp_path: Path) -> None:
    model = FAMILIES["opt-350m"].save(tmp_path / "hf")
    folder = write(model, tmp_path / "ft")
    scores = []
    for source in (tmp_path / "hf", folder):
        with lmi_multi.load(source, backend="cpu", dtype="fp32", max_tokens=40) as loaded:
            scores.append(np.concatenate(loaded.score(PROMPTS, [[7, 8, 9]] * 3)))
    assert np.allclose(scores[0], scores[1], atol=1e-4)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_narrow_weights(family: str, dtype: str, tmp_path: Path) -> None:
    model = FAMILIES[family].save(tmp_path / "hf")
    folder = write(model, tmp_path / "ft", gpus=2, dtype=dtype)
    kept = convert(folder, tmp_path / "kept")
    assert kept.dtype == ("bf16" if family == "t5" else dtype)  # T5 does not fit fp16
    wide = convert(folder, tmp_path / "wide", dtype="fp32").load_rank(0, 1)
    narrow = torch.float16 if dtype == "fp16" else torch.bfloat16
    for name, tensor in convert(tmp_path / "hf", tmp_path / "expected").load_rank(0, 1).items():
        assert torch.equal(wide[name], tensor.to(narrow).float()), name


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_any_degree_from_two_gpus(degree: int, t5: Path, tmp_path: Path) -> None:
    whole = convert(t5, tmp_path / "whole").load_rank(0, 1)
    split = convert(t5, tmp_path / "split", tensor_parallel=degree)
    assert split.tensor_parallel == degree
    assert all(torch.equal(split.load_rank(0, 1)[name], whole[name]) for name in whole)


def test_quantized(gpt2: Path, tmp_path: Path) -> None:
    assert convert(gpt2, tmp_path / "q", quantize="int8").quantize == "int8"


def test_the_parent_of_the_folder_will_do(t5: Path, tmp_path: Path) -> None:
    assert greedy(t5.parent) == greedy(t5)
    write(FAMILIES["t5"].build(), t5.parent, gpus=1)
    with pytest.raises(CheckpointError, match="holds 1-gpu, 2-gpu; name one of these"):
        convert(t5.parent, tmp_path / "out")


def test_settings_beside_the_folder_will_do(t5: Path, tmp_path: Path) -> None:
    (t5 / "config.ini").rename(t5.parent / "config.ini")
    assert convert(t5, tmp_path / "a").spec == convert(t5.parent, tmp_path / "b").spec


def test_a_folder_of_another_name(gpt2: Path, t5: Path, tmp_path: Path) -> None:
    for folder in (gpt2, t5):  # GPT-2 tells its GPUs, T5's are counted
        renamed = folder.rename(tmp_path / f"my-{folder.parent.name}")
        assert convert(renamed, tmp_path / f"{renamed.name}-out").spec.heads == 4


def test_hugging_faces_weights_in_the_same_folder_win(tmp_path: Path) -> None:
    model = FAMILIES["gpt2"].save(tmp_path / "both")
    write(model, tmp_path / "both")
    (tmp_path / "both" / "1-gpu" / "model.wte.bin").unlink()  # never looked at
    convert(tmp_path / "both", tmp_path / "out")


def test_what_an_artifact_carries(t5: Path, tmp_path: Path) -> None:
    (t5.parent / "tokenizer_config.json").write_text('{"from": "parent"}')
    (t5.parent / "spiece.model").write_bytes(b"parent")
    (t5 / "spiece.model").write_bytes(b"own")
    (t5.parent / "config.json").write_text('{"d_model": 7}')
    artifact = convert(t5.parent, tmp_path / "out")
    assert (artifact.folder / "spiece.model").read_bytes() == b"own"
    assert (artifact.folder / "tokenizer_config.json").exists()
    config = json.loads((artifact.folder / "config.json").read_text())
    assert config["architectures"] == ["T5ForConditionalGeneration"]
    assert (config["d_model"], config["decoder_start_token_id"]) == (40, 0)
    assert (config["eos_token_id"], config["pad_token_id"]) == (2, 0)
    Artifact.open(artifact.folder, verify_hashes=True)


def test_without_a_tokenizer(gpt2: Path) -> None:
    with lmi_multi.load(gpt2, backend="cpu") as model:
        assert model.tokenizer is None
        assert model.defaults.eos_token_ids == (2,)
        assert model.defaults.bos_token_id == 1


def test_description(t5: Path) -> None:
    description = describe(t5.parent)
    assert (description.family, description.dtype) == ("t5", "fp32")
    assert description.path == str(t5)
    assert description.tied_head
    assert "config.ini" in description.files
    assert description.files["shared.weight_T.bin"] == 101 * 40 * 4


def test_fingerprint_follows_every_file(t5: Path) -> None:
    prints = [fingerprint(t5.parent)]
    (t5 / "shared.weight_T.bin").write_bytes(b"short")
    prints.append(fingerprint(t5.parent))
    edit(t5, "d_kv = 16", "d_kv = 17")
    prints.append(fingerprint(t5.parent))
    (t5.parent / "spiece.model").write_bytes(b"new")
    prints.append(fingerprint(t5.parent))
    assert len(set(prints)) == 4


def test_rows_are_slices(t5: Path) -> None:
    reader = FasterTransformerReader(t5)
    for name, info in reader.tensors.items():
        whole = reader.read(name)
        assert tuple(whole.shape) == info.shape
        assert whole.is_contiguous()
        assert torch.equal(reader.read(name, 1, 3), whole[1:3])


# --- malformed ------------------------------------------------------------------------------------

RELATIVE = "relative_attention_num_buckets_or_max_pos_seq_len"
QKV = "decoder.block.1.layer.0.SelfAttention.qkv.weight.1.bin"
DENSE = "model.layers.0.attention.dense.weight.1.bin"


def refused(folder: Path, match: str, kind: type[Exception] = CheckpointError) -> None:
    with pytest.raises(kind, match=match) as caught:
        convert(folder, folder.parent / "never")
    assert not (folder.parent / "never").exists()
    assert "\n" not in str(caught.value)


def test_missing_files_are_listed(t5: Path, gpt2: Path) -> None:
    (t5 / QKV).unlink()
    (t5 / "shared.weight_T.bin").unlink()
    refused(t5, rf"lacks {QKV}, shared\.weight_T\.bin")
    (gpt2 / DENSE).unlink()
    refused(gpt2, rf"2-gpu lacks {DENSE}$")


def test_sizes(t5: Path, gpt2: Path) -> None:
    with (t5 / QKV).open("r+b") as file:
        file.truncate(1000)
    expected = 40 * 3 * 32 * 4
    refused(t5, rf"{QKV} is truncated: 1000 bytes, expected {expected} for float32 \[40, 3, 32\]")
    with (gpt2 / DENSE).open("ab") as file:
        file.write(b"\0")
    refused(gpt2, rf"{DENSE} is too long: {24 * 48 * 4 + 1} bytes, expected {24 * 48 * 4}")


def test_another_dtype_than_told(t5: Path) -> None:
    edit(t5, "weight_data_type = fp32", "weight_data_type = fp16")
    refused(t5, "is too long: .* for float16")


def test_files_of_another_model(t5: Path) -> None:
    (t5 / "encoder.block.0.layer.0.SelfAttention.q.bias.0.bin").write_bytes(b"\0\0")
    refused(t5, r"holds files that t5 on 2 GPUs does not have: encoder.*q\.bias\.0\.bin")


def test_nan_is_refused(gpt2: Path) -> None:
    np.full(101 * 48, np.nan, np.float32).tofile(gpt2 / "model.wte.bin")
    refused(gpt2, "'wte.weight' holds NaN")


@pytest.mark.parametrize(
    "key",
    ["d_model", "d_kv", "num_heads", "d_ff", "vocab_size", "num_layers", RELATIVE]
    + ["feed_forward_proj", "weight_data_type"],
)
def test_missing_keys_of_t5(key: str, t5: Path) -> None:
    edit(t5, f"\n{key} = ", f"\nno_{key} = ")
    refused(t5, rf"config\.ini: \[encoder\] {key} is missing")


@pytest.mark.parametrize(
    "key",
    ["head_num", "size_per_head", "inter_size", "num_layer", "vocab_size", "max_pos_seq_len"]
    + ["weight_data_type"],
)
def test_missing_keys_of_gpt(key: str, gpt2: Path) -> None:
    edit(gpt2, f"{key} = ", f"no_{key} = ")
    refused(gpt2, rf"config\.ini: \[gpt\] {key} is missing")


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("d_kv = 16", "d_kv = many", r"\[encoder\] d_kv is 'many', must be an integer"),
        ("d_kv = 16", "d_kv = 0", r"d_kv is 0, must be above 0"),
        ("d_kv = 16", "d_kv = 99999999999", "must be an integer of 32 bits"),
        ("num_layers = 3", "num_layers = 999999", "is 999999, but there are"),
        ("num_layers = 3", "num_layers = 4", r"lacks decoder\.block\.3"),
        ("vocab_size = 101", "vocab_size = 100", "is too long"),
        ("weight_data_type = fp32", "weight_data_type = int4", "one of fp32, fp16, bf16"),
        ("t5_with_bias = false", "t5_with_bias = maybe", "must be true or false"),
        ("layer_norm_epsilon = 1e-06", "layer_norm_epsilon = nan", "a number above 0"),
        ("use_gated_activation = false", "use_gated_activation = 1", "does not fit"),
        ("[structure]", "[structure", "cannot be read as settings"),
    ],
)
def test_wrong_settings_of_t5(old: str, new: str, match: str, t5: Path) -> None:
    edit(t5, old, new)
    refused(t5, match)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("t5_with_bias = false", "t5_with_bias = true", "t5_with_bias is 'true'; only False"),
        ("= relative\n", "= absolute\n", "position_embedding_type is 'absolute'"),
        ("[structure]", "[structure]\nia3_num_tasks = 2", "ia3_num_tasks is '2'; only 0"),
        ("[structure]", "[structure]\nt5_with_moe = 1", "t5_with_moe is '1'; only False"),
        ("[decoder]", "[decoder]\nadapter_inter_size = 64", "adapter_inter_size"),
        ("[encoder]", "[encoder]\nnum_tasks = 1", "num_tasks"),
        ("model_type = t5", "model_type = umt5", "umt5"),
        ("[decoder]", "[decoding]", r"\[decoder\] is missing or empty"),
        ("[encoder]", "[llama]", "supported models have one of"),
    ],
)
def test_other_networks_than_t5(old: str, new: str, match: str, t5: Path) -> None:
    edit(t5, old, new)
    refused(t5, match, UnsupportedModelError)


def test_stacks_of_different_sizes(t5: Path) -> None:
    head, tail = (t5 / "config.ini").read_text().split("[decoder]")
    tail = tail.replace("d_ff = 64", "d_ff = 65")
    (t5 / "config.ini").write_text(f"{head}[decoder]{tail}")
    refused(t5, r"d_ff is '64' in \[encoder\] and '65' in \[decoder\]", UnsupportedModelError)


@pytest.mark.parametrize(
    ("added", "match"),
    [
        ("has_adapters = True", "has_adapters is 'True'; only False"),
        ("num_tasks = 3", "num_tasks is '3'; only 0"),
        ("expert_num = 8", "expert_num is '8'; only 0"),
        ("activation_type = Silu", "activation_type is 'Silu'; supported: Gelu, Relu"),
        ("layernorm_type = post_layernorm", "layernorm_type is 'post_layernorm'"),
        ("has_positional_encoding = 0", "has_positional_encoding"),
        ("use_attention_linear_bias = 1", "BLOOM has one of them"),
    ],
)
def test_other_networks_than_gpt2(added: str, match: str, gpt2: Path) -> None:
    edit(gpt2, "[gpt]", f"[gpt]\n{added}")
    refused(gpt2, match, UnsupportedModelError)


def test_gpus_that_do_not_fit(gpt2: Path, t5: Path, tmp_path: Path) -> None:
    edit(gpt2, "tensor_para_size = 2", "tensor_para_size = 4")
    refused(gpt2, "tensor_para_size is 4, but the folder is named 2-gpu")
    refused(t5.rename(t5.parent / "3-gpu"), "which 3 GPUs cannot|lacks")


def test_a_file_that_becomes_shorter(t5: Path) -> None:
    reader = FasterTransformerReader(t5)
    with (t5 / "shared.weight_T.bin").open("r+b") as file:
        file.truncate(400)
    with pytest.raises(CheckpointError, match="ends after 400 bytes"):
        reader.read("shared.weight")
    with pytest.raises(CheckpointError, match="ends after 400 bytes"):
        reader.read("shared.weight", 2, 50)
    (t5 / "shared.weight_T.bin").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        reader.read("shared.weight")


@pytest.mark.parametrize("make", [lambda p: p.write_bytes(b"\xff\xfe"), lambda p: p.unlink()])
def test_unreadable_settings(make: Callable[[Path], object], t5: Path) -> None:
    make(t5 / "config.ini")
    refused(t5, "cannot be read as settings|has no weights")
