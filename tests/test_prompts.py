"""What may be passed as prompts, and what the errors say."""

from __future__ import annotations

from array import array
from collections import UserList, deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmi_multi.errors import OptionError
from lmi_multi.prompts import as_list


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("text", ["text"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        (("a", "b"), ["a", "b"]),
        ([], []),
        ((), []),
        ([3, 4], [[3, 4]]),
        ((3, 4), [[3, 4]]),
        (range(3), [[0, 1, 2]]),
        (array("l", [3, 4]), [[3, 4]]),
        (UserList([3, 4]), [[3, 4]]),
        ([deque([3, 4])], [[3, 4]]),
        ([[3, 4], [5]], [[3, 4], [5]]),
        (([3, 4], (5,)), [[3, 4], [5]]),
        ([[3], "text", range(2)], [[3], "text", [0, 1]]),
        ([[]], [[]]),
        (np.array([3, 4]), [[3, 4]]),
        (np.array([[3, 4], [5, 6]]), [[3, 4], [5, 6]]),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.array([], dtype=int), []),
        ([np.array([3, 4]), np.array([5])], [[3, 4], [5]]),
        ([np.int64(3), np.uint8(4)], [[3, 4]]),
        ([[np.int32(3)], [4, np.int64(5)]], [[3], [4, 5]]),
        (torch.tensor([3, 4]), [[3, 4]]),
        (torch.tensor([[3, 4]]), [[3, 4]]),
        ([torch.tensor([3]), torch.tensor([4])], [[3], [4]]),  # one token each, yet two prompts
        ([torch.tensor(3), torch.tensor(4)], [[3, 4]]),
        ([[torch.tensor(3)]], [[3]]),
    ],
)
def test_accepted(given: Any, expected: list[Any]) -> None:
    result = as_list(given)
    assert result == expected
    assert all(type(t) is int for prompt in result if not isinstance(prompt, str) for t in prompt)


NOT = "must be a string or a list of token ids"
ONLY = "must hold integer token ids only"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, f"prompts is a NoneType, {NOT}"),
        (5, f"prompts is a int, {NOT}"),
        (b"bytes", f"prompts is a bytes, {NOT}"),
        (memoryview(b"bytes"), f"prompts is a memoryview, {NOT}"),
        ({"a": 1}, f"prompts is a dict, {NOT}"),
        ({1, 2}, f"prompts is a set, {NOT}"),
        ((x for x in "ab"), f"prompts is a generator, {NOT}"),
        (np.array(3), f"prompts is a ndarray, {NOT}"),
        (torch.tensor(3), f"prompts is a Tensor, {NOT}"),
        ([None], f"prompt 0 is a NoneType, {NOT}"),
        (["a", None], f"prompt 1 is a NoneType, {NOT}"),
        (["a", b"b"], f"prompt 1 is a bytes, {NOT}"),
        (["a", 5], f"prompt 1 is a int, {NOT}"),
        ([5, "a"], f"prompt 0 is a int, {NOT}"),
        ([1.0, 2.0], f"prompt 0 is a float, {NOT}"),
        ([True, False], f"prompt 0 is a bool, {NOT}"),
        ([3, True], f"prompt 0 is a int, {NOT}"),
        (np.array([1.5]), f"prompt 0 is a float, {NOT}"),
        ([torch.tensor(1.5)], f"prompt 0 is a float, {NOT}"),
        (torch.tensor([True]), f"prompt 0 is a bool, {NOT}"),
        ([[3], [4.0]], f"prompt 1 holds 4.0, {ONLY}"),
        ([[3], [True]], f"prompt 1 holds True, {ONLY}"),
        ([[3], ["4"]], f"prompt 1 holds '4', {ONLY}"),
        ([[3], [None]], f"prompt 1 holds None, {ONLY}"),
        ([[[3]]], rf"prompt 0 holds \[3\], {ONLY}"),
        (torch.zeros(1, 1, 1, dtype=torch.int64), rf"prompt 0 holds \[0\], {ONLY}"),
        ([np.array([3.0])], f"prompt 0 holds 3.0, {ONLY}"),
    ],
)
def test_refused(given: Any, message: str) -> None:
    with pytest.raises(OptionError, match=f"^{message}$"):
        as_list(given)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(), inner)
    ),
    max_leaves=6,
)


@given(ANYTHING)
def test_anything_is_either_prompts_or_one_clear_line(value: Any) -> None:
    try:
        result = as_list(value)
    except OptionError as error:
        assert "\n" not in str(error)
    else:
        assert as_list(result) == result or result == [[]] * len(result)
