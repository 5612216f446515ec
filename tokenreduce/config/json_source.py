"""Files that others wrote, read with limits: regular files only, of bounded size, UTF-8, JSON of bounded depth, valid text.

Every fault is one line that names the file and what is wrong with it, in the error class that the caller gives. A value is
held to a pydantic model by `validated`, whose message names the field.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tokenreduce.config.problems import describe
from tokenreduce.config.yaml_source import Source, is_text
from tokenreduce.errors import TokenReduceError

JSON_BYTES, JSON_DEPTH = 64 * 2**20, 32
"""Bytes of a JSON file, and levels of nesting, at most: a tokenizer.json of 260,000 words takes half of that."""

Model = TypeVar("Model", bound=BaseModel)


def shown(path: str | Path) -> str:
    """A path as messages show it: as it is, or quoted where it holds control characters or bytes that are no text."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def expanded(path: str | Path, error: type[TokenReduceError]) -> Path:
    """The path with `~` and `~user` written out; `error` where there is no such user."""
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError) as problem:
        raise error(f"{shown(path)}: no such path ({problem})") from None


def exists(path: str | Path) -> bool:
    """Whether there is something by that name; False where the name itself cannot be one."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def read_bytes(path: Path, error: type[TokenReduceError], limit: int = JSON_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes. A FIFO or a device is refused, not waited for."""
    name = shown(path)
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(file, "rb") as opened:
            found = os.fstat(file)
            if stat.S_ISDIR(found.st_mode):
                raise error(f"{name}: is a directory; expected a file")
            if not stat.S_ISREG(found.st_mode):
                raise error(f"{name}: is not a regular file; give one")
            data = opened.read(limit + 1)
    except (OSError, ValueError) as problem:
        raise error(f"{name}: cannot be read ({getattr(problem, 'strerror', None) or problem})") from None
    if len(data) > limit:
        raise error(f"{name}: is larger than {limit // 2**20} MiB, too large for what it should be")
    return data


def read_text(path: Path, error: type[TokenReduceError], limit: int = JSON_BYTES) -> str:
    """As `read_bytes`, decoded from UTF-8, with or without a byte order mark."""
    data = read_bytes(path, error, limit)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        raise error(
            f"{shown(path)}:{line}: is not UTF-8 (byte 0x{data[problem.start]:02x}); save it as UTF-8"
        ) from None


def parse_json(text: str | bytes, place: str, error: type[TokenReduceError]) -> Any:
    """The value of a JSON text, called `place` in errors: nested at most JSON_DEPTH deep, with no lone surrogate in it."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise error(f"{place}: nested deeper than {JSON_DEPTH} levels") from None
    except ValueError as problem:
        raise error(f"{place}: not valid JSON ({problem})") from None
    todo = [(value, 1)]
    while todo:
        each, depth = todo.pop()
        if depth > JSON_DEPTH:
            raise error(f"{place}: nested deeper than {JSON_DEPTH} levels")
        if isinstance(each, dict):
            todo += [(key, depth) for key in each] + [(item, depth + 1) for item in each.values()]
        elif isinstance(each, list):
            todo += [(item, depth + 1) for item in each]
        elif isinstance(each, str) and not each.isascii() and not is_text(each):
            raise error(f"{place}: {each[:60]!r} is not valid Unicode text (a lone surrogate)")
    return value


def read_json(path: Path, error: type[TokenReduceError], limit: int = JSON_BYTES) -> Any:
    """The value in a JSON file."""
    return parse_json(read_text(path, error, limit), shown(path), error)


def read_object(path: Path, error: type[TokenReduceError], limit: int = JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file."""
    value = read_json(path, error, limit)
    if not isinstance(value, dict):
        raise error(f"{shown(path)}: expected a JSON object, found {type(value).__name__}")
    return value


def validated(model: type[Model], value: Any, place: str, error: type[TokenReduceError]) -> Model:
    """`value` as a `model`; `error` with the first field that does not fit: `place: field: expected …, got …`."""
    try:
        return model.model_validate(value)
    except ValidationError as problem:
        if not isinstance(value, Mapping):
            raise error(f"{place}: expected an object, found {type(value).__name__}") from None
        lines = describe(problem, Source(value, place), lambda loc: model.model_fields)
        more = f" (the first of {len(lines)} problems)" if len(lines) > 1 else ""
        raise error(lines[0] + more) from None
