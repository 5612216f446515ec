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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from harness import Options, machine  # noqa: E402

from tokenreduce.errors import TokenReduceError  # noqa: E402

RESULTS, DOCS = HERE / "results", HERE.parent / "docs"
CASES = (
    "prefill", "prefill_bf16", "rivals", "overhead", "importance", "batch", "memory", "end_to_end", "compiled", "scale"
)  # fmt: skip
"""In the order of docs/benchmarks.md."""
BY_NAME = ("rivals",)
"""Cases that run only when they are named: they need environments of other projects."""
SIZED = ("prefill", "prefill_bf16", "rivals", "overhead", "batch")
"""Cases that take --layers, --hidden and --frames."""


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
        f"`--layers`, `--hidden` and `--frames` measure another decoder or video ({', '.join(SIZED)}), off this page.",
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


def counted(step: int = 1) -> Callable[[str], int]:
    """The type of an argument that is a positive multiple of `step`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < 1 or int(text) % step:
            raise argparse.ArgumentTypeError(
                f"{text} is not a positive " + (f"multiple of {step}" if step > 1 else "number")
            )
        return int(text)

    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"out of: {', '.join(CASES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="smaller settings; results are not kept")
    sizes = parser.add_argument_group("other sizes", f"of {', '.join(SIZED)}; results are not kept")
    sizes.add_argument("--layers", type=counted(), help="depth of the decoder")
    sizes.add_argument("--hidden", type=counted(128), help="its width, a multiple of 128: heads are 64 wide, 2 of keys")
    sizes.add_argument(
        "--frames", type=counted(), nargs="+", default=[], help="lengths of the videos; 210 tokens a frame"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing; make docs/benchmarks.md from the results"
    )
    parser.add_argument("--note", default="", help="what else there is to say of this run, for the page")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.cases) - set(CASES))
    if unknown:
        parser.error(f"unknown case {unknown[0]}; known: {', '.join(CASES)}")
    options = Options(arguments.quick, arguments.threads, arguments.layers, arguments.hidden, tuple(arguments.frames))
    chosen = arguments.cases or [name for name in CASES if name not in BY_NAME]
    if options.sized:
        rigid = [name for name in chosen if name not in SIZED]
        if rigid:
            parser.error(
                f"{rigid[0]} has sizes of its own; --layers, --hidden and --frames go with: {', '.join(SIZED)}"
            )
    torch.set_num_threads(arguments.threads)
    for name in () if arguments.report else chosen:
        print(name, flush=True)
        started = time.perf_counter()
        try:
            data = machine(options) | case(name).measure(options)
        except TokenReduceError as error:  # Sizes that a pipeline of the case cannot have.
            parser.error(f"{name}: {error}")
        data |= {"seconds": time.perf_counter() - started, "note": arguments.note}
        if options.quick or options.sized:
            with tempfile.TemporaryDirectory() as folder:
                print("\n".join(case(name).section(data, Path(folder))))
            continue
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"{name}.json"
        file.write_text(json.dumps(data, indent=1), encoding="utf-8")
        print(f"wrote {file}", flush=True)
    if not options.quick and not options.sized:
        print(f"wrote {report()}")


if __name__ == "__main__":
    main()
