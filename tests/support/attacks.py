"""What an attack on the command line is held to, and values that foreign files may hold where others belong."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokenreduce.cli import main

ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        10**9,
        10**18,
        10**30,
        -(10**30),
        0.5,
        -0.0,
        1e-320,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        " ",
        "x",
        "1",
        "\x1b[31mred",
        "a\nb",
        "\u2028",
        "\u202e",
        "\ufffd",
        "é" * 300,
        "../x",
        "/dev/zero",
        "~nosuchuser",
        "a\x00b",
    ),
    *([], [1], ["x"], [None], [[]], [10**9], {}, {"a": 1}, {"x": {"y": []}}, [[[[]]]]),
)
"""Values of every kind."""
TEXTS = (
    *(
        "",
        "null",
        "1",
        "[]",
        "{",
        "}{",
        "[" * 5000,
        "[" * 200_000,
        '{"a":' * 3000,
        '{"a": "\\ud800"}',
        '{"a": 1e999}',
        "NaN",
    ),
    '{"a": ' + "1" * 6000 + "}",
)
"""Whole files."""
BYTES = (b"\xff\xfe", b"\x00" * 64, b"\xef\xbb\xbf{}", bytes(range(256)), "{}".encode("utf-16"))


class Attacks:
    """Counts what was tried, and holds each try to the contract."""

    def __init__(self, capsys: pytest.CaptureFixture[str], note: Callable[[str, object], None]) -> None:
        self.capsys, self.note, self.count, self.refused = capsys, note, 0, 0

    def run(self, *arguments: object, what: object = "") -> tuple[int, str]:
        """Exit code and stderr of a command: 0, or 2 with one line on stderr. AssertionError naming the case otherwise."""
        self.count += 1
        self.capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except BaseException as error:
            raise AssertionError(f"{arguments} {what!r:.300} ended in {type(error).__name__}: {error}") from error
        out, err = self.capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
        case = f"{arguments} {what!r:.300}: {code} {err[-500:]!r}"
        assert code in (0, 2), case
        assert "Traceback" not in out + err, case
        assert "\x1b" not in out + err, case
        if code == 2:
            self.refused += 1
            assert len(lines) >= 1, case
            assert lines[0].startswith("error: "), case
            assert all(line.startswith("error: ") for line in lines), case
        return code, err

    def done(self, least: int) -> None:
        """Tell how many there were; AssertionError where fewer than `least`."""
        self.note("attacks", f"{self.count} tried, {self.refused} refused")
        assert self.count >= least


def mutants(data: Any, number: int, seed: int) -> list[Any]:
    """Copies of plain data with one or two places damaged: another value, one more field, one fewer."""
    rng = random.Random(seed)
    found = []
    for _ in range(number):
        copy = json.loads(json.dumps(data))
        for _ in range(rng.choice((1, 1, 2))):
            copy = _damaged(copy, rng)
        found.append(copy)
    return found


def _damaged(data: Any, rng: random.Random) -> Any:
    places: list[tuple[Any, Any]] = []
    todo = [data]
    while todo:
        each = todo.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else []
        places += [(each, key) for key in keys]
        todo += [each[key] for key in keys]
    if not places:
        return rng.choice(ODD)
    holder, key = rng.choice(places)
    if rng.random() < 0.15:
        del holder[key]
    else:
        holder[key] = rng.choice(ODD)
    return data


def write_json(path: Path, value: Any) -> None:
    """A JSON file, with what JSON can say but UTF-8 cannot as escapes."""
    path.write_text(json.dumps(value), encoding="utf-8")
