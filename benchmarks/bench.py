"""Benchmarks: `python benchmarks/bench.py [CASE ...]`, or `make bench`.

Arms take turns within one run, after a warm-up; reported are medians, spread, and ratios within a turn. Each case is a module
of benchmarks/cases and writes benchmarks/results/CASE.json; at the end docs/benchmarks.md and its plots are made anew from all
results there are.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from harness import Options, machine  # noqa: E402

RESULTS, DOCS = HERE / "results", HERE.parent / "docs"
CASES = (
    "prefill", "prefill_bf16_products", "prefill_bf16", "overhead", "importance", "batch", "memory", "end_to_end", "compiled",
    "scale",
)  # fmt: skip
"""In the order of docs/benchmarks.md."""


def case(name: str) -> Any:
    """The module of a case: its TITLE, `measure(options)` that returns what goes into its JSON, and `section(data, docs)`."""
    return importlib.import_module(f"cases.{name}")


def report() -> Path:
    """Write docs/benchmarks.md and its plots from the results."""
    lines = [
        "# Benchmarks",
        "",
        "Made by `make bench` (one case alone: `python benchmarks/bench.py CASE`). The arms of a case take turns in one run",
        "after a warm-up, in alternating order; a ratio is the median of the ratios within each turn, in brackets the smallest",
        "and the largest. Weights are random unless a section says otherwise: they show speed and memory, never accuracy.",
        "",
    ]
    for name in CASES:
        file = RESULTS / f"{name}.json"
        if not file.is_file():
            continue
        data = json.loads(file.read_text(encoding="utf-8"))
        where = (
            f"{data['date']}, {data['cpu']} ({data['vectors']}), {data['threads']} of {data['cores']} cores, "
            f"torch {data['torch']}, {data['seconds']:.0f} s{'; ' * bool(data['note'])}{data['note']}; "
            f"[results](../benchmarks/results/{name}.json)"
        )
        lines += [f"## {case(name).TITLE}", "", *case(name).section(data, DOCS), "", f"*{where}*", ""]
    target = DOCS / "benchmarks.md"
    target.write_text("\n".join(lines), encoding="utf-8")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"out of: {', '.join(CASES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="smaller settings; results are not kept")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing; make docs/benchmarks.md from the results"
    )
    parser.add_argument("--note", default="", help="what else there is to say of this run, for the page")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.cases) - set(CASES))
    if unknown:
        parser.error(f"unknown case {unknown[0]}; known: {', '.join(CASES)}")
    torch.set_num_threads(arguments.threads)
    options = Options(arguments.quick, arguments.threads)
    for name in () if arguments.report else arguments.cases or CASES:
        print(name, flush=True)
        started = time.perf_counter()
        data = (
            machine(options)
            | case(name).measure(options)
            | {
                "seconds": time.perf_counter() - started,
                "note": arguments.note,
            }
        )
        if options.quick:
            with tempfile.TemporaryDirectory() as folder:
                print("\n".join(case(name).section(data, Path(folder))))
            continue
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"{name}.json"
        file.write_text(json.dumps(data, indent=1), encoding="utf-8")
        print(f"wrote {file}", flush=True)
    if not arguments.quick:
        print(f"wrote {report()}")


if __name__ == "__main__":
    main()
