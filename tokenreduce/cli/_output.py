"""What commands share: tables, JSON, and files that are not overwritten unasked."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenreduce.errors import TokenReduceError


def print_json(data: Any) -> None:
    """Indented JSON on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table that wraps on a terminal, and lines of aligned columns anywhere else."""
    if sys.stdout.isatty():
        _print_rich(columns, rows)
        return
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def write_new(path: Path, text: str, *, force: bool) -> None:
    """Write a text file. An existing one is kept, with an error, unless `force`."""
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise TokenReduceError(f"{path} exists; give another --output, or --force to overwrite it") from None
    except OSError as error:
        raise TokenReduceError(f"{path} cannot be written: {error.strerror}") from None


def _print_rich(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    Console().print(table)
