"""`tokenreduce plan --memory`: the largest video whose prefill fits, dense and reduced."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tokenreduce.cli._output import print_json, print_table
from tokenreduce.errors import BudgetError, TokenReduceError
from tokenreduce.planning.account import Account
from tokenreduce.planning.architectures import Architecture
from tokenreduce.planning.cost import kv_bytes
from tokenreduce.planning.memory import Peak, largest, prefill_peak

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """A pipeline as the search sees it. account: its token counts for so many frames; BudgetError where it cannot be met.

    read_later, spans: see `prefill_peak`. relative: whether the budget grows with the video, if there is one.
    """

    account: Callable[[int], Account]
    read_later: Collection[int] = ()
    spans: Collection[int] = ()
    relative: bool = True


def dense(arch: Architecture) -> Plan:
    """No pipeline at all."""

    def account(frames: int) -> Account:
        total = arch.tokens(frames)
        counts = [total] * arch.shape.layers
        return Account(None, arch.shape, total, arch.vision_tokens(frames), attn=counts, ffn=counts, kv=counts)

    return Plan(account)


def peak_of(arch: Architecture, plan: Plan, frames: int, weights: int) -> Peak:
    """The worst moment of the prefill of `frames` frames."""
    account = plan.account(frames)
    return prefill_peak(
        arch.shape, account.total, account.attn, account.ffn, account.kv, arch.dtype_bytes,
        weights=weights, held=arch.held(frames), read_later=plan.read_later, spans=plan.spans,
    )  # fmt: skip


def edge(arch: Architecture, plan: Plan, memory: int) -> dict[str, Any]:
    """The largest video that fits in `memory` bytes, what ends it, and the parts of the worst moment there.

    limit: `memory`, `positions` (the model was made for no more tokens) or `budget` (an absolute one that a longer video
    cannot meet). frames_by_memory: without regard to positions. needed: bytes that one frame more takes in all.
    """
    weights = arch.weight_bytes()

    def fits(frames: int) -> bool:
        try:
            return peak_of(arch, plan, frames, weights).total <= memory
        except BudgetError:
            # A share is out of reach where the text outweighs a short video, an amount where the video is too long.
            return plan.relative

    # Beyond this the vision tokens alone, as the decoder's input, are too many.
    most = max(memory - weights, 0) * arch.frames_per_step // (arch.vision_tokens(1) * arch.shape.hidden) + 1
    by_memory = largest(fits, most)
    frames, limit = by_memory, "memory"
    if arch.positions is not None:
        steps = (arch.positions - arch.text_tokens) // arch.tokens_per_frame
        frames = min(frames, steps * arch.frames_per_step)
        limit = "memory" if frames == by_memory else "positions"
    found: dict[str, Any] = {"frames": frames, "limit": limit, "frames_by_memory": by_memory, "needed": None}
    if limit == "memory":
        try:
            found["needed"] = peak_of(arch, plan, frames + 1, weights).total
        except BudgetError:
            found["limit"] = "budget"
    if not frames:
        return found
    peak, account = peak_of(arch, plan, frames, weights), plan.account(frames)
    after = kv_bytes(arch.shape, account.kv, arch.dtype_bytes)
    return found | {"tokens": account.total} | asdict(peak) | {"total": peak.total, "kv_after": after}


def show(arch: Architecture, plans: Mapping[str, Plan], memory: int, similar: float, json: bool) -> None:
    """Print the edges of all plans. TokenReduceError where not one frame fits in any of them."""
    found = {name: edge(arch, plan, memory) for name, plan in plans.items()}
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
    print(f"{arch.name} in {arch.dtype}: the longest video whose prefill fits in {_gib(memory)} GiB, and what it takes")
    if arch.note:
        print(arch.note)
    print()
    columns = ["", "frames", "tokens", "weights", "inputs", "KV", "activations", "total GiB", "worst at", "limited by"]
    print_table(columns, [_row(arch, name, row) for name, row in found.items()])
    print(
        "\ninputs: embeddings, vision features, rotary tables. KV: cached by the worst moment. Not counted: libraries, what an\n"
        "allocator keeps back, pixels, and the vision tower's own activations, which have gone before the decoder begins"
    )
    print(f"merging by threshold is taken to find {similar:.0%} similar tokens at its first look and none later")


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
