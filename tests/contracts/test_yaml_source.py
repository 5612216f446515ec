"""YAML with positions: what is read, what is refused, where errors point, and that no input hangs or escapes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenreduce.config.yaml_source import MAX_BYTES, MAX_DEPTH, MAX_NODES, parse_yaml, read_yaml, write_yaml
from tokenreduce.errors import PipelineError

DEADLINE = 5000


def parse(text: str) -> Any:
    return parse_yaml(text, "f.yaml").data


def refusal(text: str) -> str:
    with pytest.raises(PipelineError) as caught:
        parse_yaml(text, "f.yaml")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        (".5", 0.5),
        ("-12", -12),
        ("0x10", 16),
        ("0o17", 15),
        ("010", 10),
        ("true", True),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("'1'", "1"),
        ('"\\u00e9"', "é"),
        ("-.inf", float("-inf")),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    read = parse(f"a: {text}\n")["a"]
    assert read == value
    assert type(read) is type(value)


def test_nan_is_read_as_nan() -> None:
    assert parse("a: .nan")["a"] != parse("a: .nan")["a"]


def test_positions_of_keys_and_values() -> None:
    source = parse_yaml("name: x\nstages:\n  - strategy: fastv\n    at: [1,\n      2]\n", "f.yaml")
    assert source.place(("stages", 0, "at")) == "f.yaml:4:9"
    assert source.place(("stages", 0, "at"), key=True) == "f.yaml:4:5"
    assert source.place(("stages", 0, "at", 1)) == "f.yaml:5:7"
    assert source.place(("stages", 0, "missing")) == "f.yaml:3:5"
    assert source.resolve(("stages", 0, "tag[x]", "at", "list[int]", 1)) == ("stages", 0, "at", 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.yaml: is empty"),
        ("# nothing\n", "f.yaml: is empty"),
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3:1: duplicate key 'a'; first given in line 1"),
        ("s:\n - x: 1\n   x: 2\n", "f.yaml:3:4: duplicate key 'x'; first given in line 2"),
        ("a: &x 1\nb: *x\n", "f.yaml:1:4: anchors and aliases are not allowed"),
        ("a: !!python/object/apply:os.system ['true']\n", "f.yaml:1:4: tag "),
        ("a: !!str 1\n", "f.yaml:1:4: tag "),
        ("a: 1\n---\nb: 1\n", "f.yaml:2:1: not valid YAML: a second document begins here"),
        ("a:\n\t- 1\n", "f.yaml:2:1: not valid YAML: a tab cannot be used here; indent with spaces"),
        ("1: x\n", "f.yaml:1:1: a key must be text, got '1'"),
        ("? [a]\n: 1\n", "f.yaml:1:3: a key must be text"),
        ("a: b: c\n", "f.yaml:1:5: not valid YAML: mapping values are not allowed here"),
        ("x: 1\na: \x00\n", "f.yaml:2: U+0000 is not allowed in YAML"),
        ('a: "\\ud800"\n', "f.yaml:1:4: '\\ud800' is not valid Unicode text"),
        ('x: 1\na: "\\U00110000"\n', "f.yaml:2:7: not valid YAML: the number written here is too large"),
        ('a: "\\UFFFFFFFF"\n', "f.yaml:1:7: not valid YAML: the number written here is too large"),
        (f"%YAML 1.{'9' * 5000}\n---\na: 1\n", "f.yaml:1:9: not valid YAML: the number written here is too large"),
        (f"a: {'9' * 5000}\n", "is not a number that can be read"),
        ("[" * 1000, f"f.yaml:1:{MAX_DEPTH + 1}: nested deeper than {MAX_DEPTH} levels"),
        ("[" + "1," * (MAX_NODES + 1) + "]", f"more than {MAX_NODES} values"),
    ],
)
def test_refusals_name_the_place(text: str, message: str) -> None:
    assert message in refusal(text)


def test_alias_bomb_is_refused_at_its_first_anchor() -> None:
    levels = "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12))
    assert "f.yaml:1:4: anchors and aliases" in refusal(f"a: &a [x, x]\n{levels}")


def test_files_that_are_no_yaml(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: x\ndescription: é\n".encode("latin-1"))
    wide = tmp_path / "wide.yaml"
    wide.write_bytes("name: x\n".encode("utf-16"))
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_BYTES + 1))
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    for path, message in [
        (tmp_path, "is a directory; expected a YAML file"),
        (tmp_path / "none.yaml", "no such file"),
        (latin, "latin.yaml:2: is not UTF-8"),
        (wide, "wide.yaml:1: is not UTF-8"),
        (large, "larger than 64 KiB"),
        (pipe, "is not a regular file"),
        (Path("x" * 5000), "cannot be read: File name too long"),
        (Path("a\0b"), "'a\\x00b': no such file"),
    ]:
        with pytest.raises(PipelineError) as caught:
            read_yaml(path)
        assert message in str(caught.value)
        assert str(caught.value).isprintable()


def test_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: x\n")
    assert read_yaml(path).data == {"name": "x"}


plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | plain_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(plain_text, inner, max_size=4),
    max_leaves=15,
)


@settings(deadline=DEADLINE, max_examples=300)
@given(plain)
def test_written_yaml_is_read_as_the_same_data_by_us_and_by_yaml_1_1(data: Any) -> None:
    text = write_yaml({"data": data})
    assert parse(text) == {"data": data}
    assert yaml.safe_load(text) == {"data": data}


def problem(read: Callable[[], object]) -> str:
    """What reading was refused for; empty if it was not."""
    try:
        read()
    except PipelineError as error:
        return str(error)
    return ""


@settings(deadline=DEADLINE, max_examples=300)
@given(st.text(max_size=200) | st.text("[]{}:-,?&*!|>'\"%@#\n\t ab10", max_size=300))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    message = problem(lambda: parse_yaml(text, "f.yaml"))
    assert message == "" or message.startswith("f.yaml")
    assert "\n" not in message


@settings(deadline=DEADLINE, max_examples=100)
@given(raw=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(raw)
    assert "\n" not in problem(lambda: read_yaml(path))
