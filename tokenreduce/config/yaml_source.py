"""Safe YAML that remembers where each value was written. Knows nothing of pipelines.

YAML 1.2 core schema: `true`, `false`, `null`, integers and floats are recognised, so that `1e-3` is a number and `no`
is text. Refused: tags, anchors and aliases, duplicate keys, keys that are not text, several documents, files that are
large, deep or not UTF-8. Nothing is constructed but dict, list, str, int, float, bool and None.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tokenreduce.errors import PipelineError

MAX_BYTES, MAX_DEPTH, MAX_NODES = 64 * 1024, 32, 10_000

Loc = tuple[str | int, ...]
"""The way to a value: `("stages", 2, "threshold")`."""
Mark = tuple[int, int]
"""Line and column, both from 1."""

_TAG = "tag:yaml.org,2002:"
_CORE = {
    "null": (re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    "int": (re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    "float": (
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
}

_READ: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": lambda text: int(text, 0 if text[:2] in ("0o", "0x") else 10),
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
}


@dataclass(frozen=True)
class Source:
    """Plain data and where it came from."""

    data: Any
    """The value."""
    name: str
    """What errors call it: the file as the user gave it, or `pipeline`."""
    values: dict[Loc, Mark] = field(default_factory=dict)
    """Where each value begins; empty for data that was not read from a file."""
    keys: dict[Loc, Mark] = field(default_factory=dict)
    """Where the key of each mapping entry begins; empty likewise."""

    def place(self, loc: Loc, *, key: bool = False) -> str:
        """`file:line:column` of the value at `loc` (or of its key), or of the nearest thing around it."""
        marks = self.keys if key else self.values
        while loc and loc not in marks:
            loc, marks = loc[:-1], self.values
        mark = marks.get(loc)
        return f"{self.name}:{mark[0]}:{mark[1]}" if mark else self.name

    def resolve(self, loc: Loc) -> Loc:
        """The longest way that `loc` leads into the data, passing over parts that are not in it."""
        value, found = self.data, []
        for part in loc:
            inside = (isinstance(value, dict) and part in value) or (
                isinstance(value, list) and isinstance(part, int) and part < len(value)
            )
            if inside:
                value = value[part]
                found.append(part)
        return tuple(found)


def read_yaml(path: Path) -> Source:
    """Read one YAML file. Raises PipelineError, one line with the place."""
    name = str(path) if str(path).isprintable() else repr(str(path))
    try:
        if path.is_dir():
            raise PipelineError(f"{name}: is a directory; expected a YAML file")
        if not path.exists():
            raise PipelineError(f"{name}: no such file")
        if not path.is_file():
            raise PipelineError(f"{name}: is not a regular file; expected a YAML file")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PipelineError(f"{name}: cannot be read: {reason}") from None
    if len(raw) > MAX_BYTES:
        raise PipelineError(f"{name}: is larger than {MAX_BYTES // 1024} KiB, too large for a pipeline")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise PipelineError(f"{name}:{line}: is not UTF-8 (byte 0x{raw[error.start]:02x}); save it as UTF-8") from None
    return parse_yaml(text, name)


def parse_yaml(text: str, name: str) -> Source:
    """Parse one YAML document, called `name` in errors. Raises PipelineError."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        except (ValueError, OverflowError):  # PyYAML's own chr() and int(): it stands before the digits.
            problem = "the number written here is too large (the last character is \\U0010FFFF)"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=loader.get_mark()) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise PipelineError(f"{name}:{line}: U+{ord(text[error.position]):04X} is not allowed in YAML") from None
    except yaml.MarkedYAMLError as error:
        raise PipelineError(_syntax_error(error, name)) from None
    if node is None:
        raise PipelineError(f"{name}: is empty; a pipeline is a mapping with `name` and `stages`")
    values: dict[Loc, Mark] = {}
    keys: dict[Loc, Mark] = {}

    def build(node: yaml.Node, loc: Loc) -> Any:
        values[loc] = _mark(node)
        if isinstance(node, yaml.SequenceNode):
            return [build(item, (*loc, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node, name)
        mapping: dict[str, Any] = {}
        for key_node, item in node.value:
            key = _key(key_node, name)
            if key in mapping:
                first = keys[(*loc, key)]
                raise PipelineError(
                    f"{_at(name, key_node)}: duplicate key {short(key)}; first given in line {first[0]}"
                )
            keys[(*loc, key)] = _mark(key_node)
            mapping[key] = build(item, (*loc, key))
        return mapping

    return Source(build(node, ()), name, values, keys)


def write_yaml(data: Any) -> str:
    """Block style YAML that `parse_yaml` and YAML 1.1 readers take for the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def short(value: object, limit: int = 60) -> str:
    """`value` for an error message: one line, cut at `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def is_text(value: str) -> bool:
    """Whether `value` can be encoded: no lone surrogates."""
    return not any(0xD800 <= ord(character) < 0xE000 for character in value)


class _RefusedError(yaml.MarkedYAMLError):
    """YAML that is well formed and yet refused."""


class _Loader(yaml.BaseLoader):
    """Composes nodes within the limits above. Its constructors are not used."""

    depth = nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self.nodes += 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            self._refuse(event, "anchors and aliases are not allowed; write the value out")
        if getattr(event, "tag", None):
            self._refuse(event, f"tag {short(event.tag)} is not allowed; write the plain value")
        if self.depth >= MAX_DEPTH:
            self._refuse(event, f"nested deeper than {MAX_DEPTH} levels")
        if self.nodes > MAX_NODES:
            self._refuse(event, f"more than {MAX_NODES} values, too many for a pipeline")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _refuse(self, event: Any, problem: str) -> None:
        raise _RefusedError(problem=problem, problem_mark=event.start_mark)


class _Dumper(yaml.SafeDumper):
    """Indents lists below their key, and quotes text that either YAML version would take for something else."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # PyYAML folds these line breaks into spaces, except in double quotes.
        style = '"' if any(character in text for character in "\x85\u2028\u2029") else None
        return self.represent_scalar(f"{_TAG}str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)
for _name, (_pattern, _first) in _CORE.items():
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)


def _scalar(node: yaml.ScalarNode, name: str) -> Any:
    """The value of a scalar."""
    text: str = node.value
    kind = node.tag.removeprefix(_TAG)
    if kind == "str" and not is_text(text):
        raise PipelineError(f"{_at(name, node)}: {short(text)} is not valid Unicode text")
    try:
        return _READ.get(kind, str)(text)
    except ValueError:
        raise PipelineError(f"{_at(name, node)}: {short(text)} is not a number that can be read") from None


def _key(node: yaml.Node, name: str) -> str:
    """A mapping's key, which must be text."""
    key = _scalar(node, name) if isinstance(node, yaml.ScalarNode) else None
    if not isinstance(key, str):
        written = f", got {short(node.value)}" if isinstance(node, yaml.ScalarNode) else ""
        raise PipelineError(f"{_at(name, node)}: a key must be text{written}")
    return key


def _mark(node: yaml.Node) -> Mark:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _at(name: str, node: yaml.Node) -> str:
    line, column = _mark(node)
    return f"{name}:{line}:{column}"


def _syntax_error(error: yaml.MarkedYAMLError, name: str) -> str:
    """One line for what PyYAML spreads over several."""
    mark = error.problem_mark or error.context_mark
    place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
    problem = _one_line(error.problem or error.context or "unknown error")
    if isinstance(error, _RefusedError):
        return f"{place}: {problem}"
    if problem == "but found another document":
        problem = "a second document begins here; a file holds one pipeline"
    elif "'\\t'" in problem:
        problem = "a tab cannot be used here; indent with spaces"
    elif error.context and error.problem:
        problem = f"{problem} ({_one_line(error.context)})"
    return f"{place}: not valid YAML: {problem}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
