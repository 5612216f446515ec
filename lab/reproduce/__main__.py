"""Command line of the reproduction; see `--help`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lab.reproduce.plan import TABLES, wanted
from lab.reproduce.report import write
from lab.reproduce.results import tabulate
from lab.reproduce.rows import Rows
from lab.reproduce.run import honesty, run
from tokenreduce.compare.settings import fingerprint
from tokenreduce.errors import TokenReduceError
from tokenreduce.testbed.embedded import EMBEDDED


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and write the report."""
    args = _arguments(arguments)
    tables = tuple(table for table in TABLES if not args.tables or table.key in args.tables)
    try:
        mark = fingerprint(args.model)
        folder = args.cache / f"{mark.split()[-1][:12]}-seed-{args.seed}"
        with Rows(folder) as rows:
            checks = honesty(args.model, args.seed)
            units = [] if args.report_only else rows.missing(wanted(tables, args.examples))
            started = time.monotonic()
            with _progress() as progress:
                task = progress.add_task("arms × examples", total=sum(unit.rows for unit in units))
                run(units, rows, args.model, args.seed, args.workers, lambda done: progress.advance(task, done))
            seconds = time.monotonic() - started
            made = [tabulate(table, rows, args.examples) for table in tables]
            write(args.output, made, rows, checks, seed=args.seed, weights=mark, workers=args.workers, seconds=seconds)
    except TokenReduceError as error:
        print(f"error: {error}")
        return 1
    print(f"written: {args.output}")
    return 0


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lab.reproduce",
        description="Reproduce the tables and figures of FrameFusion on the embedded model. What is done is not done again.",
    )
    parser.add_argument("--tables", nargs="+", choices=[table.key for table in TABLES], help="default: all")
    parser.add_argument(
        "--examples", type=_positive, help="at most so many examples per arm (default: each table's own number)"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/reproduction"))
    parser.add_argument("--cache", type=Path, default=Path("runs/reproduce"), help="where finished examples are kept")
    parser.add_argument("--model", default=EMBEDDED, help="`embedded`, or a checkpoint folder of the same shape")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=_positive, default=2, help="processes, of one thread each")
    parser.add_argument("--report-only", action="store_true", help="write the report of what is there, and run nothing")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
