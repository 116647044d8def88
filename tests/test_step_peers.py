"""What decode steps are compared with: that peers answer as they should, and say what they lack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import ctranslate2_peer, steps
from benchmarks.ctranslate2_peer import CTRANSLATE2
from benchmarks.graphed import GRAPHED, Graphed
from benchmarks.peers import Answer, Peer, Task
from benchmarks.shapes import SHAPES, Shape
from benchmarks.static_cache import STATIC
from lmi_multi.defaults import GenerationDefaults
from lmi_multi.engine.engine import Engine
from lmi_multi.engine.sequence import Sequence
from lmi_multi.models.weights import bind
from lmi_multi.options import GenerateOptions
from tests import tiny_models
from tests.families import VOCAB

CPU = torch.device("cpu")
ROWS, PROMPT, TOKENS = 4, 20, 20
COVERED = ["t5", "t5-gated-untied", "mt5", "gptj", "gptneox", "gptneox-sequential", "llama"]
COVERED += ["llama-gqa", "llama-mqa-biased-tied", "llama3-rope", "llama-yarn-rope", "qwen2"]
SIZES = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
LLAMA = {"intermediate_size": 96, "max_position_embeddings": 128}
MORE = {
    "tiny-gptj": Shape("GPTJForCausalLM", "GPTJConfig", SIZES | {"rotary_dim": 8}),
    "tiny-llama": Shape("LlamaForCausalLM", "LlamaConfig", SIZES | LLAMA),
}
TINY = ["tiny-t5", *MORE]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, shape in MORE.items():
        monkeypatch.setitem(SHAPES, name, shape)


def task(shape: str, **changed: Any) -> Task:
    given: dict[str, Any] = {"dtype": "fp32", "batches": [1, 3], "prompt": 6, "tokens": 5}
    return Task(shape, **{**given, "rounds": 1, "device": CPU, **changed})


def own_tokens(artifact: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of the CPU's backend, which no end token ends."""
    executor = tiny_models.executor(artifact)
    decoder = artifact.spec.kind == "decoder"
    options = GenerationDefaults(decoder_start_token_id=0).resolve(
        GenerateOptions(max_new_tokens=TOKENS),
        prompt_tokens=len(prompts[0]),
        decoder_only=decoder,
        limit=executor.limits.max_tokens,
    )
    answers = [
        Sequence(options, list(own)) if decoder else Sequence(options, [0], list(own))
        for own in prompts
    ]
    Engine(executor).run(answers)
    return [list(answer.tokens[-TOKENS:]) for answer in answers]


@pytest.mark.parametrize("family", COVERED)
def test_plain_torch_answers_as_we_do(tmp_path: Path, family: str) -> None:
    """Again and again: an answer leaves tokens and keys behind."""
    artifact = tiny_models.artifact(tmp_path, family)
    chance = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, VOCAB, (ROWS, PROMPT), generator=chance).tolist()
    expected = own_tokens(artifact, prompts)
    assert len({token for row in expected for token in row}) > 3
    weights = bind(artifact.spec, artifact.load_rank(0, 1))
    graphed = Graphed(artifact.spec, weights, ROWS, PROMPT, TOKENS, capture=False)
    assert graphed.answer(prompts[::-1], TOKENS) == expected[::-1]
    assert graphed.answer(prompts, TOKENS) == expected
    assert graphed.answer(prompts, 1) == [row[:1] for row in expected]


@pytest.mark.parametrize(
    ("family", "lack"),
    [
        ("gpt2", "learned positions"),
        ("bloom", "alibi positions"),
        ("umt5", "a relative bias of each layer"),
        ("mistral-window", "sliding windows"),
        ("qwen3", "norms of queries and keys"),
    ],
)
def test_plain_torch_says_what_it_lacks(tmp_path: Path, family: str, lack: str) -> None:
    artifact = tiny_models.artifact(tmp_path, family)
    weights = bind(artifact.spec, artifact.load_rank(0, 1))
    with pytest.raises(SystemExit, match=f"in plain torch does not have {lack}$"):
        Graphed(artifact.spec, weights, 1, 4, 4, capture=False)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("peer", [STATIC, GRAPHED])
def test_timings(peer: Peer, shape: str, dtype: str) -> None:
    given = task(shape, dtype=dtype)
    peer.check(given)
    for rows, timing in zip([1, 3], peer.timings(given), strict=True):
        assert timing.rows == rows and timing.first > 0 and timing.whole > 0
        assert timing.step == pytest.approx((timing.whole - timing.first) / 4)


def test_answers_of_another_length_stop_everything() -> None:
    def answers(given: Task) -> Iterator[tuple[int, Answer]]:
        yield 3, lambda count: [[7] * count, [7] * count, [7] * (count - 1)]

    peer = Peer("x", lambda given: None, answers)
    with pytest.raises(SystemExit, match=r"3 answers of 5 tokens wanted.* are \[5, 5, 4\]"):
        list(peer.timings(task("tiny-t5")))


def test_peers_say_what_they_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="tiny-gpt2: --peer torch does not have learned positions"):
        GRAPHED.check(task("tiny-gpt2"))
    with pytest.raises(SystemExit, match="tiny-t5: --peer torch does not have a float32 residual"):
        GRAPHED.check(task("tiny-t5", dtype="fp16"))
    monkeypatch.setattr(ctranslate2_peer, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install ctranslate2$"):
        CTRANSLATE2.check(task("tiny-t5"))
    monkeypatch.setattr(ctranslate2_peer, "find_spec", lambda name: "found")
    with pytest.raises(SystemExit, match=r"tiny-gpt2 is a GPT2LMHeadModel; .* T5ForCond"):
        CTRANSLATE2.check(task("tiny-gpt2"))
    monkeypatch.setattr(ctranslate2_peer, "CUBLAS", "libnone.so.12")
    with pytest.raises(SystemExit, match=r"needs libnone.so.12, which is not found"):
        CTRANSLATE2.check(task("tiny-t5", device=torch.device("cuda", 0)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"peer": ["jax"]}, "--peer is 'jax'; allowed: transformers, torch, ctranslate2"),
        ({"peer": ["torch"], "beams": 4, "batch": [4]}, "--beams is 4; with --peer it must be 1"),
        ({"peer": ["torch"], "quantize": "int8"}, "--quantize is 'int8'; with --peer it must be"),
        ({"beams": 4}, "--batch is 1, 4, 16, 64; with --beams 4 it must be multiples"),
        ({"work": Path("/none")}, "--work is '/none'; no such folder"),
    ],
)
def test_options_of_steps(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        steps.main(shape=["tiny-t5"], **given)


@pytest.mark.parametrize("shape", TINY)
def test_ctranslate2_answers_as_transformers_does(shape: str, tmp_path: Path) -> None:
    """But for its end token, which it leaves out of answers that must be long."""
    pytest.importorskip("ctranslate2")
    given = task(shape, work=tmp_path)
    theirs = [answer(12) for _, answer in STATIC.answers(given)]
    found = [answer(12) for _, answer in CTRANSLATE2.answers(given)]
    vocabulary = ctranslate2_peer.Vocabulary(given.spec.vocab)
    ids = vocabulary.get_vocab()
    end = ids[vocabulary.eos_token]
    for rows, others in zip(theirs, found, strict=True):
        for own, other in zip(rows, others, strict=True):
            shown = [ids[token] if isinstance(token, str) else token for token in other]
            stop = list(own).index(end) if end in own else len(own)
            assert len(shown) == 12 and shown[:stop] == list(own)[:stop]
    assert not list(tmp_path.iterdir())
