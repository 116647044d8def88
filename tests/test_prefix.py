"""Prefix caching: nothing is computed twice, and every answer is as without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmi_multi.engine.prefix import PrefixCache
from lmi_multi.model import Model
from lmi_multi.models.spec import Rope
from tests.families import VOCAB
from tests.tiny_models import Watched, artifact, executor, is_clean, model

DECODERS = [
    *("gpt2", "bloom", "gptj", "gptneox", "opt", "llama", "llama3-rope", "mistral-window", "qwen3"),
]


def computed(watched: Watched) -> int:
    """How many tokens have gone through the decoder since the last time."""
    total = sum(len(row.token_ids) for batch in watched.batches for row in batch.rows)
    watched.batches.clear()
    return total


def prompts(count: int, shared: int, seed: int = 0) -> list[list[int]]:
    """Prompts with the first `shared` tokens in common, of different lengths."""
    random = Random(seed)
    first = [random.randrange(3, VOCAB) for _ in range(shared)]
    ends = [[random.randrange(3, VOCAB) for _ in range(1 + i % 7)] for i in range(count)]
    return [first + end for end in ends]


def options(count: int) -> list[dict[str, Any]]:
    kinds: list[dict[str, Any]] = [
        {},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3, "num_return_sequences": 2},
        {"repetition_penalty": 1.4, "logprobs": 1},
    ]
    return [kinds[i % 4] | {"seed": i, "max_new_tokens": 1 + i % 9} for i in range(count)]


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("limits", [{}, {"max_step_tokens": 5}, {"blocks": 30}], ids=str)
def test_answers_are_as_without(family: str, limits: dict[str, int], checkpoints: Path) -> None:
    built, asked = artifact(checkpoints, family), options(16)
    given = [*prompts(8, 19), *prompts(4, 8, seed=1), *prompts(2, 33, seed=2)]
    same = given[0][:12]  # behind other beginnings, so with other keys and values
    given += [[5] * 8 + same, [6] * 8 + same]
    with Model(built, "cpu", executor(built), prefix_caching=False) as without:
        expected = without.generate(given, asked)
    with model(built, **limits) as opened:
        for _ in range(2):  # the second time most of every prompt is known
            found = opened.generate(given, asked)
            assert [c.token_ids for c in found] == [c.token_ids for c in expected]
            assert [c.finish_reason for c in found] == [c.finish_reason for c in expected]
            assert is_clean(opened)


def test_what_is_shared_is_computed_once(checkpoints: Path) -> None:
    built = artifact(checkpoints, "gpt2")
    watched = Watched(executor(built, block_size=4, max_batch=8, blocks=128))
    given = prompts(8, shared=21)
    rest = sum(len(prompt) - 20 for prompt in given)  # of the 21, five blocks are full
    with model(built, watched) as opened:
        opened.generate(given, max_new_tokens=1)
        assert computed(watched) == 20 + rest
        opened.generate(given, max_new_tokens=1)
        full = [(len(prompt) - 1) // 4 * 4 for prompt in given]  # and of what follows, some
        assert computed(watched) == sum(len(p) - n for p, n in zip(given, full, strict=True))
        opened.generate(given[:1], num_beams=4, max_new_tokens=1)
        assert computed(watched) == len(given[0]) - full[0]
        opened.generate([given[0][:20]], max_new_tokens=1)
        assert computed(watched) == 4  # the last token's block is computed again
        opened.generate([[9, *given[0]]], max_new_tokens=1)
        assert computed(watched) == len(given[0]) + 1


def test_a_long_prompt_is_shared_while_it_is_prefilled(checkpoints: Path) -> None:
    built = artifact(checkpoints, "gpt2")
    watched = Watched(executor(built, block_size=4, max_step_tokens=8))
    with model(built, watched) as opened:
        opened.generate(prompts(4, shared=40), max_new_tokens=1)
        assert computed(watched) == 40 + sum(1 + i for i in range(4))


def test_places_are_needed(checkpoints: Path) -> None:
    """More prompts than the cache can keep: the oldest are forgotten, the others are not."""
    built = artifact(checkpoints, "gpt2")
    watched = Watched(executor(built, block_size=4, blocks=16, max_batch=1))
    given = [[n] * 17 for n in range(3, 8)]  # five blocks each, four of them kept
    with model(built, watched) as opened:
        for prompt in given:
            opened.generate([prompt], max_new_tokens=1)
            assert computed(watched) == 17
        opened.generate(given[-1:], max_new_tokens=1)
        assert computed(watched) == 1
        opened.generate(given[:1], max_new_tokens=1)
        assert computed(watched) == 17
        assert is_clean(opened)


def test_encoder_decoders_have_none(checkpoints: Path) -> None:
    """What their decoders compute depends on the encoded prompt."""
    watched = Watched(executor(artifact(checkpoints, "t5"), block_size=4))
    with model(artifact(checkpoints, "t5"), watched) as opened:
        first, second = (
            opened.generate([[5] * 30, [6] * 30], max_new_tokens=9, ignore_eos=True)
            for _ in range(2)
        )
        assert not opened._engine.scheduler.cache.enabled
    assert [c.token_ids for c in first] == [c.token_ids for c in second]


def test_keys_that_depend_on_the_length_are_not_shared(checkpoints: Path) -> None:
    spec = artifact(checkpoints, "llama-linear-rope").spec
    assert isinstance(spec.position, Rope) and spec.position.scaling is not None
    assert not spec.length_dependent
    scaling = replace(spec.position.scaling, type="dynamic")
    assert replace(spec, position=replace(spec.position, scaling=scaling)).length_dependent


def test_it_can_be_switched_off(checkpoints: Path) -> None:
    built = artifact(checkpoints, "gpt2")
    watched = Watched(executor(built, block_size=4))
    with Model(built, "cpu", watched, prefix_caching=False) as opened:
        for _ in range(2):
            opened.generate([[5] * 30, [5] * 30], max_new_tokens=1)
            assert computed(watched) == 60


class Prompts(RuleBasedStateMachine):
    """Owners come, store and go; a model knows what every block holds."""

    @initialize(blocks=st.integers(1, 12), size=st.integers(1, 3))
    def start(self, blocks: int, size: int) -> None:
        self.cache, self.count, self.size = PrefixCache(blocks, size), blocks, size
        self.owners: list[tuple[list[int], list[int]]] = []
        self.holds: dict[int, tuple[int, ...]] = {}  # all tokens up to the block's end

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def admit(self, tokens: list[int]) -> None:
        needed = -(-len(tokens) // self.size)
        shared = self.cache.find(tokens)
        assert len(shared) * self.size < len(tokens)
        for place, block in enumerate(shared):
            assert self.holds[block] == tuple(tokens[: (place + 1) * self.size])
        if not self.cache.fits(needed - len(shared), shared):
            return
        owner: list[int] = []
        self.cache.share(shared, owner)
        self.cache.take(needed - len(shared), owner)
        assert owner[: len(shared)] == shared and len(set(owner)) == needed
        taken = {block for _, blocks in self.owners for block in blocks}
        assert taken.isdisjoint(owner[len(shared) :])
        for place in range(len(shared), needed):
            self.holds[owner[place]] = tuple(tokens[: (place + 1) * self.size])
        self.owners.append((tokens, owner))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def store(self, data: st.DataObject) -> None:
        tokens, owner = data.draw(st.sampled_from(self.owners))
        length = data.draw(st.integers(0, len(tokens)))
        self.cache.store(tokens[:length], owner)
        self.cache.store(tokens[:length], owner)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.owners) - 1))
        _, owner = self.owners.pop(at)
        self.cache.give_back(owner)
        assert owner == []

    @invariant()
    def every_block_is_used_or_free(self) -> None:
        if hasattr(self, "owners"):
            used = {block for _, owner in self.owners for block in owner}
            assert self.cache.free == self.count - len(used)


TestPrompts = Prompts.TestCase
TestPrompts.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
