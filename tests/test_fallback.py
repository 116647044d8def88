"""Architectures that no family declares, through transformers: the same answers as its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lmi_multi
from lmi_multi.checkpoint.inspect import describe
from lmi_multi.cli.main import run
from lmi_multi.errors import (
    BackendError,
    CapacityError,
    CheckpointError,
    LmiError,
    OptionError,
    UnsupportedModelError,
)
from lmi_multi.fallback import loading
from lmi_multi.model import Model
from lmi_multi.options import GenerateOptions
from tests.foreign_models import FOREIGN, foreign, greedy, reference
from tests.tiny_models import checkpoint

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 3, 20], [50], [7] * 20]


def opened(folder: Path, **keywords: Any) -> Model:
    return lmi_multi.load(folder, backend="cpu", fallback="transformers", **keywords)


@pytest.fixture
def phi(checkpoints: Path) -> Iterator[Model]:
    with opened(foreign(checkpoints, "phi", tokenizer=True)) as model:
        yield model


@pytest.mark.parametrize("name", FOREIGN)
def test_greedy_answers_are_those_of_transformers(name: str, checkpoints: Path) -> None:
    folder = foreign(checkpoints, name)
    theirs = reference(folder)
    with opened(folder) as ours:
        assert ours.backend == "transformers"
        found = [c.token_ids for c in ours.generate(PROMPTS, max_new_tokens=12)]
    assert found == [greedy(theirs, ids, 12) for ids in PROMPTS]


@pytest.mark.parametrize("name", ["phi", "bart"])
def test_log_probabilities_are_those_of_transformers(name: str, checkpoints: Path) -> None:
    folder = foreign(checkpoints, name)
    theirs = reference(folder)
    answer = [30, 31, 5, 9]
    given = torch.tensor([PROMPTS[0]])
    with torch.inference_mode(), opened(folder) as ours:
        if name == "phi":
            known = torch.tensor([[*PROMPTS[0], *answer]])
            rows = theirs(known).logits[0, len(PROMPTS[0]) - 1 : -1]
        else:
            start = theirs.config.decoder_start_token_id
            rows = theirs(given, decoder_input_ids=torch.tensor([[start, *answer]])).logits[0, :-1]
        expected = rows.log_softmax(-1)[range(4), answer]
        [scores] = ours.score([PROMPTS[0]], [answer])
        torch.testing.assert_close(torch.tensor(scores), expected, atol=1e-4, rtol=1e-4)
        [drawn] = ours.generate([PROMPTS[0]], max_new_tokens=5, logprobs=2)
        [again] = ours.score([PROMPTS[0]], [drawn.token_ids])
        assert drawn.logprobs is not None
        assert [e.logprob for e in drawn.logprobs] == pytest.approx(again.tolist(), abs=1e-4)


def test_options_mean_what_they_mean_everywhere(phi: Model) -> None:
    sampling: dict[str, Any] = {"do_sample": True, "seed": 3, "max_new_tokens": 9, "top_k": 40}
    together = phi.generate(["one", "two"], **sampling)
    alone = phi.generate("two", **sampling)[0]
    assert together[1].token_ids == alone.token_ids
    assert alone.token_ids != phi.generate("two", max_new_tokens=9)[0].token_ids
    several = phi.generate("x", num_return_sequences=3, **sampling)
    assert len({tuple(c.token_ids) for c in several}) == 3
    [whole] = phi.generate("one", max_new_tokens=9)
    chunks = list(phi.stream("one", max_new_tokens=9))
    assert "".join(chunk.text or "" for chunk in chunks) == whole.text and len(chunks) > 1
    banned = phi.generate("one", max_new_tokens=9, suppress_tokens=whole.token_ids[:1])[0]
    assert whole.token_ids[0] not in banned.token_ids


def test_a_stream_that_is_left_leaves_nothing_behind(phi: Model) -> None:
    expected = [c.token_ids for c in phi.generate(["abc", "xyz"], max_new_tokens=8)]
    stream = phi.stream("something else", max_new_tokens=8)
    next(stream)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert [c.token_ids for c in phi.generate(["abc", "xyz"], max_new_tokens=8)] == expected


def test_a_step_that_fails_can_be_run_again(phi: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    [expected] = phi.generate("abc", max_new_tokens=8)
    network = phi._engine.executor._network  # type: ignore[attr-defined]
    plain, calls = network.forward, []

    def failing(*given: Any, **keywords: Any) -> Any:
        calls.append(keywords["input_ids"].shape[1])
        result = plain(*given, **keywords)  # the cache has changed by now
        if len(calls) == 4:
            raise RuntimeError("in the middle")
        return result

    monkeypatch.setattr(network, "forward", failing)
    job = phi._reader.job(0, phi._reader.ids("abc", 0), GenerateOptions(max_new_tokens=8))
    phi._engine.submit(job.requests)
    with pytest.raises(RuntimeError, match="in the middle"):
        while True:
            phi._engine.step()
    assert len(job.answers[0].generated) == 3
    while job.answers[0].finish_reason is None:
        phi._engine.step()
    assert job.answers[0].generated == expected.token_ids
    read = len(expected.prompt_token_ids)
    assert calls == [read, 1, 1, 1, read + 3, 1, 1, 1, 1]  # all of it again, once


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"quantize": "int8"}, "quantize is 'int8'; allowed beside fallback='transformers': None"),
        ({"tensor_parallel": 2}, "tensor_parallel is 2; allowed beside"),
        ({"tensor_parallel": True}, "tensor_parallel is True; allowed beside"),
        ({"max_batch": 4}, "max_batch is 4; allowed beside fallback='transformers': None or 1"),
        ({"verify": True}, "verify is True; allowed beside"),
        ({"dtype": "fp8"}, "dtype is 'fp8', must be one of auto"),
        ({"max_tokens": 129}, "max_tokens is 129, but the model's positions end at 128"),
        ({"max_tokens": 0}, "max_tokens is 0, must be an integer, at least 1"),
    ],
)
def test_what_it_does_not_carry_is_refused(
    keywords: dict[str, Any], message: str, checkpoints: Path
) -> None:
    with pytest.raises(OptionError) as error:
        opened(foreign(checkpoints, "phi"), **keywords)
    assert str(error.value).startswith(message)


def test_what_it_does_not_answer_is_refused(phi: Model) -> None:
    with pytest.raises(OptionError, match="num_beams is 2; allowed: at most 1"):
        phi.generate("a", num_beams=2)
    with pytest.raises(OptionError, match="encodes and embeds nothing"):
        phi.embed("a")
    with pytest.raises(OptionError, match="the prompt has 128 tokens; allowed: at most 127"):
        phi.generate("a" * 127)


def test_beams_of_the_model_s_own_file_are_refused_by_their_name(
    checkpoints: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(foreign(checkpoints, "bart"), tmp_path / "bart")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"num_beams": 4}))
    with opened(folder) as model:
        with pytest.raises(OptionError, match=r"num_beams in generation_config.json is 4; allowed"):
            model.generate([[5]])
        assert model.generate([[5]], num_beams=1, max_new_tokens=2)[0].token_ids


def test_other_hardware_is_refused(checkpoints: Path) -> None:
    with pytest.raises(BackendError, match="backend is 'neuron'; allowed"):
        lmi_multi.load(foreign(checkpoints, "phi"), backend="neuron", fallback="transformers")
    with pytest.raises(OptionError, match="fallback is 'accelerate'; allowed: None or"):
        lmi_multi.load(foreign(checkpoints, "phi"), fallback="accelerate")


def test_only_what_no_family_declares(checkpoints: Path) -> None:
    with opened(checkpoint(checkpoints, "llama")) as model:
        assert model.backend == "cpu"
    with pytest.raises(UnsupportedModelError, match="fallback='transformers' may run it"):
        lmi_multi.load(foreign(checkpoints, "phi"), backend="cpu")


def _changed(source: Path, target: Path, **fields: Any) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | fields))
    return target


def test_a_setting_that_no_family_declares_counts_too(checkpoints: Path, tmp_path: Path) -> None:
    folder = _changed(checkpoint(checkpoints, "opt"), tmp_path / "a", activation_function="tanh")
    with pytest.raises(UnsupportedModelError, match="activation_function is 'tanh'"):
        lmi_multi.load(folder, backend="cpu")
    with opened(folder) as model:
        [found] = model.generate([PROMPTS[0]], max_new_tokens=6)
    assert found.token_ids == greedy(reference(folder), PROMPTS[0], 6)


def test_no_remote_code(checkpoints: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w').close()\n"
    automatic = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    source = foreign(checkpoints, "phi")
    known = _changed(source, tmp_path / "known", auto_map=automatic)
    own = _changed(
        source, tmp_path / "own", auto_map=automatic, architectures=["OwnModel"], model_type="own"
    )
    for folder in (known, own):
        (folder / "own.py").write_text(code)
    with pytest.raises(UnsupportedModelError, match="'OwnModel' is declared by no family, and is"):
        opened(own)
    with opened(known) as model:
        model.generate([[5]], max_new_tokens=2)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "bart"}, "model_type is 'bart', but PhiForCausalLM belongs to 'phi'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"architectures": ["PhiModel"]}, "'PhiModel' is declared by no family, and is no causal"),
        ({"hidden_size": "wide"}, "does not make a PhiForCausalLM"),
        ({"num_hidden_layers": 3}, "weights and config disagree"),
        ({"intermediate_size": 50}, "cannot be loaded by transformers"),
    ],
)
def test_a_config_that_does_not_fit(
    fields: dict[str, Any], message: str, checkpoints: Path, tmp_path: Path
) -> None:
    folder = _changed(foreign(checkpoints, "phi"), tmp_path / "changed", **fields)
    with pytest.raises(CheckpointError) as error:
        opened(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_weights_that_are_missing(checkpoints: Path, tmp_path: Path) -> None:
    folder = _changed(foreign(checkpoints, "phi"), tmp_path / "less")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.fc1.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys, .* model.layers.1.mlp.fc1.weight"):
        opened(folder)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        opened(folder)


def test_weights_that_are_too_large(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 1000

    monkeypatch.setattr(loading.psutil, "virtual_memory", Memory)
    with pytest.raises(CapacityError, match=r"the weights need .* of memory"):
        opened(foreign(checkpoints, "phi"))


def test_dtype(checkpoints: Path) -> None:
    with opened(foreign(checkpoints, "phi"), dtype="bf16") as model:
        assert model._engine.executor._network.dtype == torch.bfloat16  # type: ignore[attr-defined]
        assert len(model.generate([[5]], max_new_tokens=3)[0].token_ids) == 3


def test_inspect_says_which_engine(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = describe(foreign(checkpoints, "bart"))
    assert (found.engine, found.family, found.sizes["kind"]) == (
        "transformers",
        "bart",
        "encoder-decoder",
    )
    assert found.bytes_per_rank == 4 * found.parameters
    tensors = load_file(foreign(checkpoints, "bart") / "model.safetensors").values()
    assert found.parameters == sum(tensor.numel() for tensor in tensors)
    assert describe(checkpoint(checkpoints, "llama")).engine == "lmi_multi"
    assert run(["inspect", str(foreign(checkpoints, "bart"))]) == 0
    assert "transformers, if asked for: --fallback transformers" in capsys.readouterr().out


def test_the_command_line(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign(checkpoints, "phi", tokenizer=True)
    options = ["--backend=cpu", "--max-new-tokens=6", "--json", "--fallback=transformers"]
    assert run(["generate", str(folder), "abc", *options]) == 0
    found = capsys.readouterr()
    with opened(folder) as model:
        [expected] = model.generate("abc", max_new_tokens=6)
    assert json.loads(found.out)["token_ids"] == expected.token_ids
    assert "transformers (" in found.err.splitlines()[-1]


def test_perplexity(checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, text = foreign(checkpoints, "phi", tokenizer=True), tmp_path / "text"
    text.write_text("a text")
    command = ["perplexity", str(folder), "--file", str(text), "--json", "--backend=cpu"]
    assert run([*command, "--fallback=transformers"]) == 0
    found = json.loads(capsys.readouterr().out)
    with opened(folder) as model:
        ids = model.tokenizer.encode("a text") if model.tokenizer else []
    with torch.inference_mode():
        loss = reference(folder)(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert found["tokens"] == len(ids) - 1
    assert found["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)


def test_closed(phi: Model) -> None:
    phi.close()
    with pytest.raises(LmiError, match="closed"):
        phi.generate("a")
