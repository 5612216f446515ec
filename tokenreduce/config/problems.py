"""Turns what pydantic found wrong with a pipeline into lines that say where, what was expected, and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from tokenreduce.config.yaml_source import Loc, Source, short
from tokenreduce.errors import nearest

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "none_required": "null",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "literal_error": "{expected}",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
    "string_pattern_mismatch": "text that matches {pattern}",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
}
"""What pydantic's error types mean, in the reader's words."""

KnownFields = Callable[[Loc], Iterable[str]]
"""Names that the mapping at a place may have."""


class _Problem(NamedTuple):
    loc: Loc
    key: bool
    text: str


def problem(loc: Loc, text: str, value: object) -> ValidationError:
    """An error for a validator to raise: `text` about the `value` at `loc`, relative to what is being validated."""
    custom = PydanticCustomError("tokenreduce", "{text}", {"text": text})
    return ValidationError.from_exception_data("pipeline", [InitErrorDetails(type=custom, loc=loc, input=value)])


def describe(error: ValidationError, source: Source, known: KnownFields) -> list[str]:
    """One line per problem, in the order of the file: `file:line:column: field: expected …, got …`."""
    groups: dict[Loc, list[ErrorDetails]] = {}
    problems: list[_Problem] = []
    for details in error.errors(include_url=False):
        loc, whole = source.resolve(details["loc"]), details["loc"]
        if details["type"] == "extra_forbidden":
            problems.append(_Problem(loc, True, f"unknown field{nearest(str(loc[-1]), known(loc[:-1]))}"))
        elif details["type"] == "missing":
            problems.append(_Problem(loc, False, f"the field '{whole[-1]}' is missing"))
        else:
            groups.setdefault(loc, []).append(details)
    # A union reports each of its branches; the branch that got furthest into the value says most.
    deepest = [loc for loc in groups if not any(len(other) > len(loc) and other[: len(loc)] == loc for other in groups)]
    problems += [_Problem(loc, False, _merged(groups[loc])) for loc in deepest]
    problems.sort(key=lambda each: (source.keys if each.key else source.values).get(each.loc, (0, 0)))
    return [f"{source.place(each.loc, key=each.key)}: {_field(each.loc)}{each.text}" for each in problems]


def _merged(branches: list[ErrorDetails]) -> str:
    """One message for the errors of all branches of a union, or of one plain field."""
    expected = []
    for details in branches:
        if details["type"] not in _EXPECTED:
            continue
        expected.append(_EXPECTED[details["type"]].format(**details.get("ctx", {})))
    if len(expected) < len(branches):
        odd = next(details for details in branches if details["type"] not in _EXPECTED)
        return _plain_message(odd)
    value = branches[0]["input"]
    return f"expected {' or '.join(dict.fromkeys(expected))}, got {short(value)}{_hint(value, expected)}"


def _plain_message(details: ErrorDetails) -> str:
    message = " ".join(details["msg"].removeprefix("Value error, ").split())
    if message.startswith("Input should be "):
        return f"expected {message.removeprefix('Input should be ')}, got {short(details['input'])}"
    return message


def _hint(value: Any, expected: list[str]) -> str:
    """`; did you mean 'x'?` if `value` is close to one of the names in `expected`."""
    if not isinstance(value, str):
        return ""
    names = [name for text in expected for name in re.findall(r"'([^']*)'", text)]
    match = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def _field(loc: Loc) -> str:
    """`stages[2].threshold: ` for the head of a line; empty for the whole pipeline."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part if part.isprintable() and len(part) <= 60 else short(part)}"
    return f"{text.removeprefix('.')}: " if text else ""
