"""Whatever stands where a terminal should, a command ends with an exit code that says how, and with no traceback."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "import sys; from tokenreduce.cli import main; sys.exit(main())"
COMMANDS = {
    "plan": ["plan", "fastv"],
    "json": ["strategies", "--json"],
    "error": ["validate", "é\x1b[31m.yaml"],
    "help": ["--help"],
}
STREAMS = {
    "closed": ">&-",
    "full": "> /dev/full",
    "both closed": ">&- 2>&-",
    "stderr closed": "2>&-",
    "errors full": "2> /dev/full",
}
ENCODINGS = ("ascii", "latin-1", "cp1252", "utf-8", "utf-16")


def shell(arguments: list[str], redirect: str = "", **variables: str) -> subprocess.CompletedProcess[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'adapters'}",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    command = ["sh", "-c", f'"$@" {redirect}', "sh", sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, env=environment, timeout=200)


@pytest.mark.parametrize(
    ("command", "stream"),
    [
        pytest.param(*case, marks=() if case in (("help", "closed"), ("json", "full")) else pytest.mark.slow)
        for case in itertools.product(COMMANDS, STREAMS)
    ],
)
def test_closed_and_full_streams(command: str, stream: str) -> None:
    run = shell(COMMANDS[command], STREAMS[stream])
    assert b"Traceback" not in run.stderr
    assert b"Exception ignored" not in run.stderr
    if stream in ("closed", "full") and command != "error":
        assert run.returncode == 2
        assert run.stderr.startswith(b"error: stdout")
        assert run.stderr.count(b"\n") == 1
    elif stream in ("stderr closed", "errors full"):
        assert run.returncode == (2 if command == "error" else 0)
    else:
        assert run.returncode == 2


@pytest.mark.parametrize(
    ("command", "encoding"),
    [
        pytest.param(*case, marks=() if case == ("plan", "ascii") else pytest.mark.slow)
        for case in itertools.product(COMMANDS, ENCODINGS)
    ],
)
def test_encodings(command: str, encoding: str) -> None:
    run = shell(COMMANDS[command], PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert run.returncode == (2 if command == "error" else 0), run.stderr
    text = run.stdout.decode(encoding)
    assert "Traceback" not in run.stderr.decode(encoding)
    assert "\x1b" not in run.stderr.decode(encoding)
    if command == "json":
        assert json.loads(text)
    elif command == "plan":
        assert "speedup" in text
