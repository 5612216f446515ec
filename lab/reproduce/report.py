"""docs/reproduction: README.md, results.json, results.csv, outcomes.csv and the figures, all made from the rows."""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from lab.reproduce import figures
from lab.reproduce.markdown import readme
from lab.reproduce.plan import LENGTHS
from lab.reproduce.rows import Rows
from tokenreduce import __version__
from tokenreduce.compare.checks import Check
from tokenreduce.config.outputs import write_file

COLUMNS = (
    "table",
    "condition",
    "arm",
    "examples",
    "right",
    "accuracy",
    "low",
    "high",
    "relative_tokens",
    "relative_flops",
    "needle_kept",
    "needle_merged",
    "needle_dropped",
    "difference",
    "difference_low",
    "difference_high",
    "only_this",
    "only_other",
    "p",
    "p_holm",
    "refused",
)


def write(
    output: Path,
    tables: Sequence[dict[str, Any]],
    rows: Rows,
    checks: Iterable[Check],
    *,
    seed: int,
    weights: str,
    workers: int,
    seconds: float,
) -> None:
    """Write everything. seconds: wall-clock time of this run, which may have found rows of earlier ones."""
    output.mkdir(parents=True, exist_ok=True)
    setting = {
        "command": "python -m lab.reproduce",
        "seed": seed,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "tokenreduce": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, {processor()}",
        "weights": weights,
        "workers": workers,
        "cpu_minutes": round(sum(row["cpu_seconds"] for row in rows.rows) / 60, 1),
        "wall_minutes_of_last_run": round(seconds / 60, 1),
        "arms_times_examples": len(rows.rows),
    }
    draw(output, tables)
    data = {"setting": setting, "checks": [check.to_dict() for check in checks], "tables": list(tables)}
    write_file(output / "results.json", json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    _write_csv(output / "results.csv", COLUMNS, (line for table in tables for line in lines(table)))
    _write_csv(output / "outcomes.csv", ("condition", "arm", "examples", "outcomes"), outcomes(rows))
    write_file(output / "README.md", readme(data))


def draw(output: Path, tables: Sequence[dict[str, Any]]) -> None:
    """The figures of those tables that have one."""
    panels = {table["key"]: table["panels"] for table in tables}
    if "fig7" in panels:
        figures.tradeoff(panels["fig7"], output / "fig7.png")
    if "table7" in panels:
        figures.lengths(panels["table7"], LENGTHS, output / "fig10.png")
    if "fig12" in panels:
        figures.needle_grid(panels["fig12"], LENGTHS, output / "fig12.png")


def lines(table: dict[str, Any]) -> Iterable[tuple[Any, ...]]:
    """One line of results.csv per arm of a table."""
    for panel in table["panels"]:
        for entry in panel["arms"]:
            if not entry["examples"]:
                yield table["key"], panel["condition"], entry["arm"], 0, *[""] * 16, entry["refused"]
                continue
            fates = [entry["needle"][fate] for fate in ("kept", "merged", "dropped")]
            against = [entry.get("difference", ""), *entry.get("difference_interval", ("", ""))]
            against += [entry.get(name, "") for name in ("only_this", "only_other", "p", "p_holm")]
            numbers = [entry["accuracy"], *entry["interval"], entry["relative_tokens"], entry["relative_flops"], *fates]
            counts = (entry["examples"], entry["right"])
            yield (
                table["key"],
                panel["condition"],
                entry["arm"],
                *counts,
                *map(_short, [*numbers, *against]),
                entry["refused"],
            )


def outcomes(rows: Rows) -> list[tuple[str, str, int, str]]:
    """Every answer: per condition and arm one character per example, 1 right, 0 wrong, - refused, in the order of the stream."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows.rows:
        mark = "-" if "refused" in row else str(int(row["right"]))
        found.setdefault((row["condition"], row["arm"]), {})[row["index"]] = mark
    return [
        (condition, arm, len(marks), "".join(marks[i] for i in sorted(marks)))
        for (condition, arm), marks in sorted(found.items())
    ]


def processor() -> str:
    """The name of the processor as the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text(encoding="utf-8").splitlines() if info.is_file() else [])
        if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)
        table.writerows(rows)
