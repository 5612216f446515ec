"""What commands share: tables, JSON, and files that are not overwritten unasked."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenreduce.config.outputs import reserved, unwritable, write_file
from tokenreduce.errors import plain


def print_json(data: Any) -> None:
    """Indented JSON on stdout, in ASCII where stdout is not UTF-8. Under --json nothing else gets there."""
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    text = json.dumps(data, indent=2, ensure_ascii=not unicode) + "\n"
    getattr(sys.stdout, "result", sys.stdout.write)(text)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table that wraps on a terminal, and lines of aligned columns anywhere else."""
    rows = [[plain(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich(columns, rows)
        return
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def write_new(path: Path, text: str, *, force: bool) -> None:
    """Write a text file. An existing one is kept, with an error, unless `force`."""
    with reserved(path, force):
        try:
            write_file(path, text)
        except OSError as error:
            raise unwritable(path, error) from None


def _print_rich(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    Console().print(table)
