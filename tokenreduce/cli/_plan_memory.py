"""`tokenreduce plan --memory`: prints the largest video whose prefill fits, dense and reduced."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tokenreduce.cli._output import print_json, print_prose, print_table
from tokenreduce.errors import TokenReduceError
from tokenreduce.planning.architectures import Architecture
from tokenreduce.planning.longest import Workload, longest_video

GIB = 2**30


def show(arch: Architecture, loads: Mapping[str, Workload], memory: int, similar: float, json: bool) -> None:
    """Print the longest video of each of `loads`. TokenReduceError where not one frame fits in any of them."""
    found = {name: longest_video(arch, load, memory) for name, load in loads.items()}
    weights = arch.weight_bytes()
    if not any(row["frames"] for row in found.values()):
        needed = [row["needed"] for row in found.values() if row["needed"] is not None]
        one = f", with one frame {_gib(min(needed), up=True)} GiB" if needed else ""
        raise TokenReduceError(
            f"{_gib(memory)} GiB does not hold {arch.name}: its weights alone take {_gib(weights)} GiB in {arch.dtype}{one}"
        )
    if json:
        print_json({"model": arch.name, "dtype": arch.dtype, "memory": memory, "note": arch.note, "plans": found})
        return
    print_prose(
        f"{arch.name} in {arch.dtype}: the longest video whose prefill fits in {_gib(memory)} GiB, and what it takes"
    )
    if arch.note:
        print_prose(arch.note)
    print()
    columns = ["", "frames", "tokens", "weights", "inputs", "KV", "activations", "total GiB", "worst at", "limited by"]
    print_table(columns, [_row(arch, name, row) for name, row in found.items()])
    print_prose(
        "\ninputs: embeddings, vision features, rotary tables. KV: cached by the worst moment. Not counted: libraries, what an "
        "allocator keeps back, pixels, and the vision tower's own activations, which have gone before the decoder begins"
    )
    print_prose(f"merging by threshold is taken to find {similar:.0%} similar tokens at its first look and none later")


def _row(arch: Architecture, name: str, row: Mapping[str, Any]) -> list[str]:
    if row["limit"] == "positions":
        reason = f"positions ({arch.positions:,}); memory at {row['frames_by_memory']:,} frames"
    elif row["limit"] == "budget":
        reason = "budget, which one more frame cannot meet"
    else:
        reason = f"memory: one more frame takes {_gib(row['needed'], up=True)}"
    if not row["frames"]:
        return [name, "0", *["-"] * 7, reason]
    parts = [_gib(row[part]) for part in ("weights", "inputs", "kv", "activations", "total")]
    where = f"layer {row['layer']}" if row["layer"] < arch.shape.layers else "LM head"
    return [name, f"{row['frames']:,}", f"{row['tokens']:,}", *parts, where, reason]


def _gib(count: int, up: bool = False) -> str:
    return f"{math.ceil(100 * count / GIB) / 100 if up else count / GIB:,.2f}"
