"""The reader of .properties files: Java's rules, and what it refuses beyond them."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmi_multi.errors import OptionError
from lmi_multi.serve import properties


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("# one\n ! two\n\n \t\f\n", {}),
        ("a=1\r\nb: 2\rc 3\n", {"a": "1", "b": "2", "c": "3"}),
        ("  a \t=\f 1", {"a": "1"}),
        ("a==1\nb=:1\nc = = 1", {"a": "=1", "b": ":1", "c": "= 1"}),
        ("option.s3url=s3://bucket/prefix/", {"option.s3url": "s3://bucket/prefix/"}),
        ("a=1 # no comment", {"a": "1 # no comment"}),
        ("a=1  ", {"a": "1  "}),
        ("a=", {"a": ""}),
        ("a=b\\\n   c\\\r\n\td", {"a": "bcd"}),
        ("a=b\\\\\nc=d", {"a": "b\\", "c": "d"}),
        ("a=b\\\n# c", {"a": "b# c"}),
        ("# a\\\nb=c", {"b": "c"}),
        ("a\\ b\\=\\:c=d", {"a b=:c": "d"}),
        ("a=\\t\\n\\r\\f\\q\\ \\u00e9", {"a": "\t\n\r\fq \u00e9"}),
        ("a=\\ud83d\\ude00", {"a": "\U0001f600"}),
        ("a=b\\\n", None),
        ("a=\\u12g4", None),
        ("a=\\ud83d", None),
        ("=1", None),
        ("a", None),
        ("a=1\na=1", None),
    ],
)
def test_a_text_is_read_as_java_does_or_refused(text: str, expected: dict[str, str] | None) -> None:
    if expected is not None:
        assert properties.parse(text) == expected
        return
    with pytest.raises(OptionError, match=r"^serving.properties, line \d+: [^\n]+$"):
        properties.parse(text)


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "x.properties"
    file.write_text("a=1\n\n# c\nb=\\\n  2\na=3\n")
    with pytest.raises(OptionError, match=f"^{file}, line 6: a is given twice, first in line 1"):
        properties.read(file)
    file.write_bytes(b"a=1\r\nb=\xff\n")
    with pytest.raises(OptionError, match=f"^{file}, line 2: not UTF-8$"):
        properties.read(file)


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    file = tmp_path / "x.properties"
    file.write_bytes(b"\xef\xbb\xbfa=1\n")
    assert properties.read(file) == {"a": "1"}


def test_what_is_no_file_or_too_large_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path, Path("a\0b")):
        with pytest.raises(OptionError, match="cannot be read"):
            properties.read(path)
    large = tmp_path / "large"
    large.write_bytes(b"#" * (properties.MAX_BYTES + 1))
    with pytest.raises(OptionError, match="too large"):
        properties.read(large)


@given(st.dictionaries(st.text(min_size=1), st.text()))
def test_what_is_escaped_comes_back(pairs: dict[str, str]) -> None:
    lines = [f"{_escaped(name)}={_escaped(value)}" for name, value in pairs.items()]
    assert properties.parse("\n".join(lines)) == pairs


@given(st.text(alphabet="ab=: \t\\\n\r#!u0", max_size=30))
def test_any_text_gives_pairs_or_one_line(text: str) -> None:
    try:
        properties.parse(text)
    except OptionError as error:
        assert "\n" not in str(error)


def _escaped(text: str) -> str:
    plain = string.ascii_letters + string.digits
    units = text.encode("utf-16-be", "surrogatepass")
    codes = [int.from_bytes(units[i : i + 2], "big") for i in range(0, len(units), 2)]
    return "".join(chr(c) if c < 128 and chr(c) in plain else f"\\u{c:04x}" for c in codes)
