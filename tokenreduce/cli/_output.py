"""What commands share: tables, prose, JSON, and files that are not overwritten unasked.

On a terminal, tables and prose keep within its width: cells of words fold, and a table that would still be too wide becomes one
record per row. Nothing is cut off. Anywhere else a row is a line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from tokenreduce.config.outputs import reserved, unwritable, write_file
from tokenreduce.errors import plain, printable

GAP = "  "
"""Between two columns."""
FOLDS_FROM = 20
"""Cells of a column are folded to no less than this width: below it, a record is easier to read."""

BUDGET_HELP = (
    "What remains, for all pipelines: a share (0.3), an amount (512MiB, 12.5TFLOPs), or fields: 'flops=0.25', "
    "'tokens=192, of=vision'."
)


def print_json(data: Any) -> None:
    """Indented JSON on stdout, in ASCII where stdout is not UTF-8. Under --json nothing else gets there."""
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    text = json.dumps(data, indent=2, ensure_ascii=not unicode) + "\n"
    getattr(sys.stdout, "result", sys.stdout.write)(text)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns where there is room for them, else one record per row."""
    rows = [[plain(cell) for cell in row] for row in rows]
    print("\n".join(table_lines(columns, rows, terminal_width(sys.stdout))))


def print_prose(text: str, *, file: TextIO | None = None, indent: str = "") -> None:
    """Sentences, which break at words on a terminal; lines after the first begin with `indent`."""
    file = file or sys.stdout
    width = terminal_width(file)
    for paragraph in text.split("\n"):
        print("\n".join(wrap(printable(paragraph), width, indent)), file=file)


def terminal_width(file: TextIO) -> int | None:
    """Columns of the terminal behind `file`, or what the variable COLUMNS says; None if there is none."""
    if not file.isatty():
        return None
    said = os.environ.get("COLUMNS", "")
    if said.isdecimal() and int(said):
        return int(said)
    try:
        return os.get_terminal_size(file.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """The lines of a table, of at most `width` columns where its longest word allows that; None: however long they are."""
    if width is None:
        widths = [max(_cells(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    else:
        found = _fit(columns, rows, width)
        if found is None:
            return _records(columns, rows, width)
        widths = found
    lines = []
    for row in (columns, *rows):
        folded = [wrap(cell, size if width else None) for cell, size in zip(row, widths, strict=True)]
        for number in range(max(map(len, folded))):
            parts = [part[number] if number < len(part) else "" for part in folded]
            lines.append(
                GAP.join(part + " " * (w - _cells(part)) for part, w in zip(parts, widths, strict=True)).rstrip()
            )
    return lines


def wrap(text: str, width: int | None, indent: str = "") -> list[str]:
    """Lines of at most `width` columns, broken at spaces alone; a longer word has a line to itself."""
    if width is None or _cells(text) <= width:
        return [text]
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1].strip() or not word else lines[-1] + word
        if _cells(longer) <= width or not lines[-1].strip():
            lines[-1] = longer
        else:
            lines.append(indent + word)
    return [line.rstrip() for line in lines]


def write_new(path: Path, text: str, *, force: bool) -> None:
    """Write a text file. An existing one is kept, with an error, unless `force`."""
    with reserved(path, force):
        try:
            write_file(path, text)
        except OSError as error:
            raise unwritable(path, error) from None


def _fit(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """Widths of columns that fit into `width`; None if there are none.

    Heads fold first. Then the widest column gives way, down to its longest word or FOLDS_FROM, and then the next one.
    """
    heads = [max(map(_cells, head.split(" "))) for head in columns]
    wanted = [max([head, *(_cells(row[i]) for row in rows)]) for i, head in enumerate(heads)]
    words = [max([head, *(_cells(w) for row in rows for w in row[i].split(" "))]) for i, head in enumerate(heads)]
    least = [min(want, max(word, FOLDS_FROM)) for want, word in zip(wanted, words, strict=True)]
    spare = width - len(GAP) * (len(columns) - 1)
    if sum(least) > spare:
        return None
    while sum(wanted) > spare:
        widest = max((i for i in range(len(wanted)) if wanted[i] > least[i]), key=lambda i: wanted[i])
        wanted[widest] -= 1
    for i, head in enumerate(columns):  # What is left over unfolds heads, from the left.
        more = min(max(0, _cells(head) - wanted[i]), spare - sum(wanted))
        wanted[i] += more
    return wanted


def _records(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """A paragraph per row: its first cell, then a line for each other cell that says something."""
    label = max(map(_cells, columns[1:]))
    lines = []
    for row in rows:
        lines += wrap(row[0] or columns[0], width, GAP)
        for head, cell in zip(columns[1:], row[1:], strict=True):
            if cell:
                start = GAP + head + " " * (label - _cells(head)) + GAP
                first, *rest = wrap(cell, max(width - len(start), 1))
                lines += [start + first, *(" " * _cells(start) + line for line in rest)]
        lines.append("")
    return lines[:-1]


def _cells(text: str) -> int:
    """Columns that a terminal gives `text`: two for a wide character."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
