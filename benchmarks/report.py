"""docs/benchmarks.md and its plot from benchmarks/results/*.json: `python benchmarks/report.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

RESULTS = Path(__file__).with_name("results")
DOCS = Path(__file__).parents[1] / "docs"


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def prefill(data: dict[str, Any]) -> list[str]:
    rows = [
        [
            f"{row['tokens']:,}", row["dtype"], f"{row['budget']}", row["pipeline"], f"{row['dense_seconds']['median']:.1f}",
            "{median:.1f} ({min:.1f}–{max:.1f}, {runs} runs)".format(**row["seconds"]),
            f"{row['measured']:.2f}×", f"{row['predicted']:.2f}×", f"{row['ratio']:.2f}",
        ]
        for row in data["rows"]
    ]  # fmt: skip
    columns = [
        "N",
        "dtype",
        "C",
        "pipeline",
        "dense s",
        "reduced s",
        "measured",
        "predicted by FLOPs",
        "measured ÷ predicted",
    ]
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axis = figure.add_subplot()
    curve = [row for row in data["rows"] if row["dtype"] == "float32" and row["tokens"] == data["rows"][0]["tokens"]]
    for number, name in enumerate(dict.fromkeys(row["pipeline"] for row in curve)):
        points = sorted((row["budget"], row["measured"], row["predicted"]) for row in curve if row["pipeline"] == name)
        colour = ("#0072B2", "#D55E00", "#009E73")[number % 3]
        axis.plot([p[0] for p in points], [p[1] for p in points], "o-", color=colour, label=f"{name}, measured")
        axis.plot([p[0] for p in points], [p[2] for p in points], "x:", color=colour, label=f"{name}, predicted")
    axis.set(xlabel="relative token budget C", ylabel="prefill speed-up over dense", title="24 layers, width 896, fp32")
    axis.grid(color="#dddddd")
    axis.legend(fontsize=8)
    figure.savefig(DOCS / "benchmarks.png")
    return [
        f"## Prefill, {data['layers']} layers of width 896, random weights, video-like embeddings",
        "",
        *table(columns, rows),
        "",
        "![Speed-up against budget](benchmarks.png)",
    ]


def decode(data: dict[str, Any]) -> list[str]:
    rows = [
        [
            row["pipeline"],
            f"{1e3 * row['seconds']['dense']['median']:.2f}",
            f"{row['extra_ms_per_step']:+.3f}",
            str(row["seconds"]["dense"]["runs"]),
        ]
        for row in data["rows"]
    ]
    return [
        f"## What an attached pipeline costs a decode step, {data['layers']} layers of width 896",
        "",
        *table(["pipeline", "dense ms", "attached ms more", "steps"], rows),
        "",
        "A reduced cache makes the step cheaper, an unreduced one shows what the hooks cost.",
    ]


def cumulative(data: dict[str, Any]) -> list[str]:
    rows = [
        [f"{row['tokens']:,}", f"{row['share_of_a_layer']:.1%}", f"{row['share_of_28_layers']:.2%}"]
        for row in data["rows"]
    ]
    return [
        "## Exact cumulative importance without an N×N matrix, width 896",
        "",
        *table(["N", "of one layer's time", "of a dense 28-layer prefill"], rows),
    ]


def main() -> None:
    lines = [
        "# Benchmarks",
        "",
        "Made by `make bench`. CPU seconds of the process; arms take turns in one run; medians.",
        "",
    ]
    for name, section in (("prefill", prefill), ("decode", decode), ("cumulative", cumulative)):
        file = RESULTS / f"{name}.json"
        if not file.is_file():
            continue
        data = json.loads(file.read_text(encoding="utf-8"))
        how = f"{data['date']}, {data['machine']} CPU, {data['threads']} thread, torch {data['torch']}"
        lines += [*section(data), "", f"*{how}{', quick settings' if data['quick'] else ''}.*", ""]
    (DOCS / "benchmarks.md").write_text("\n".join(lines), encoding="utf-8")
    print(f"wrote {DOCS / 'benchmarks.md'}")


if __name__ == "__main__":
    main()
