"""What the commands look like on terminals of several widths, and what they say of their progress."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tokenreduce.cli import _output, _plan_memory, _progress, main, models, presets, run, strategies
from tokenreduce.cli._output import table_lines, wrap

WIDTHS = (80, 100, 160)
Shown = list[tuple[Sequence[str], Sequence[Sequence[str]]]]


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> Iterator[Callable[[], str]]:
    """Standard output and error are a pseudo-terminal of `width` columns; yields what reads its text so far."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    got: list[bytes] = []

    def read() -> None:
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:
                return
            if not data:
                return
            got.append(data)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    def text() -> str:
        sys.stdout.flush()
        time.sleep(0.05)
        return b"".join(got).decode().replace("\r\n", "\n")

    with os.fdopen(slave, "w") as file, monkeypatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "stdout", file)
        patch.setattr(sys, "stderr", file)
        yield text
    reader.join(5)
    os.close(master)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """Every table that a command prints, as it was given to `print_table`."""
    tables: Shown = []
    real = _output.print_table

    def spy(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        tables.append((columns, rows))
        real(columns, rows)

    for module in (_output, _plan_memory, strategies, models, presets, run):
        monkeypatch.setattr(module, "print_table", spy)
    return tables


def check(text: str, width: int, tables: Shown) -> None:
    """Nothing is cut off, no line is too wide, and every word of every cell is there as often as it is in the tables."""
    assert tables
    assert "…" not in text
    text = text[text.rfind("\x1b[K") + 3 :] if "\x1b[K" in text else text
    for line in text.split("\n"):
        assert len(line) <= width or " " not in line.strip(), line
    words = Counter(text.split())
    cells = Counter(word for _, rows in tables for row in rows for cell in row for word in cell.split())
    assert not cells - words
    # In records the first column, which names them, has no head.
    heads = {word for columns, _ in tables for column in columns[1:] for word in column.split()}
    assert heads <= set(words)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "arguments",
    [
        ["strategies"],
        ["models"],
        ["presets"],
        ["plan", "framefusion_end_to_end", "fastv", "prune_then_merge"],
        ["plan", "framefusion", "streaming_llm", "--memory", "18GiB"],
    ],
    ids=" ".join,
)
def test_tables_keep_every_digit_and_name(
    width: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch, shown: Shown
) -> None:
    with terminal(monkeypatch, width) as text:
        assert main(arguments) == 0
        check(text(), width, shown)


def test_run_at_every_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: Shown) -> None:
    from tokenreduce.cli import _report

    arms: list[Any] = []
    monkeypatch.setattr(
        _report, "save_folder", lambda folder, model, inputs, found, asking: arms.extend(found) or [f"wrote {folder}"]
    )
    with terminal(monkeypatch, 80) as text:
        arguments = ["run", "demo", "--pipeline", "framefusion_end_to_end", "--repeats", "1", "--new-tokens", "1"]
        assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
        check(text(), 80, shown)
    assert [row[0] for row in shown[0][1]] == ["dense", "framefusion_end_to_end"]
    for width in WIDTHS[1:]:
        shown.clear()
        with terminal(monkeypatch, width) as text:
            run._print(arms, "What is that?", "7", 600)
            check(text(), width, shown)


def test_compare_at_every_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: Shown) -> None:
    folder = str(tmp_path / "out")
    arguments = ["compare", "--arm", "prune_then_merge", "--budget", "0.3", "--examples", "1"]
    assert main([*arguments, "--pictures", "0", "--new-tokens", "1", "--output", folder]) == 0
    for width in WIDTHS:
        shown.clear()
        with terminal(monkeypatch, width) as text:
            assert main(["compare", "--report-only", "--output", folder]) == 0
            check(text(), width, shown)
    assert len(shown) == 3


def test_a_table_folds_cells_and_then_becomes_records() -> None:
    columns, rows = ["arm", "tokens", "why"], [["one", "1,234 (0.300)", "because it is so in every case of this kind"]]
    assert table_lines(columns, rows, None)[1] == "one  1,234 (0.300)  because it is so in every case of this kind"
    folded = table_lines(columns, rows, 45)
    assert folded[1:] == ["one  1,234 (0.300)  because it is so in every", "                    case of this kind"]
    assert table_lines(columns, rows, 30) == [
        "one",
        "  tokens  1,234 (0.300)",
        "  why     because it is so in",
        "          every case of this",
        "          kind",
    ]
    # Wide characters take two columns.
    assert table_lines(["a", "b"], [["日本", "x"], ["y", "z"]], 80) == ["a     b", "日本  x", "y     z"]


def test_prose_breaks_at_words_alone() -> None:
    text = "read /a/very/long/path/that/nobody/breaks.yaml and go on"
    assert wrap(text, 20, "  ") == ["read", "  /a/very/long/path/that/nobody/breaks.yaml", "  and go on"]
    assert wrap(text, None) == [text]


def test_progress_is_plain_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_progress, "FIRST", 0.05)
    monkeypatch.setattr(_progress, "EVERY", 0.05)
    with _progress.progress("compare") as state:
        state.reach(40, 100, "examples")
        time.sleep(0.2)
        state.reach(70, 100, "examples")
        state.began -= 60
        assert state.line() == "compare: 70 of 100 examples, 1:00 so far, about 1:00 left"
        time.sleep(0.2)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "compare: 40 of 100 examples, 0:00 so far"
    assert lines[-1] == "compare: 70 of 100 examples, 1:00 so far, about 1:00 left"
    assert "\r" not in err


def test_progress_is_one_changing_line_on_a_terminal_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_progress, "REDRAW", 0.02)
    with terminal(monkeypatch, 60) as text:
        with _progress.progress("run") as state:
            state.total = 5
            state.step("loading the model")
            state.step("preparing the video")
            time.sleep(0.1)
        seen = text()
    assert "\r\x1b[Krun: 1 of 5, preparing the video, 0:00 so far" in seen
    assert seen.endswith("\r\x1b[K")
    assert "\n" not in seen


def test_quiet_work_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_progress, "FIRST", 0.01)
    monkeypatch.setattr(_progress.voice, "quiet", True)
    with _progress.progress("run"):
        time.sleep(0.1)
    assert capsys.readouterr() == ("", "")
