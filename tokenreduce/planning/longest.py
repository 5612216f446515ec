"""The longest video whose prefill fits in a memory, dense or reduced."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any

from tokenreduce.errors import BudgetError
from tokenreduce.pipeline import Pipeline, build
from tokenreduce.planning.account import Account
from tokenreduce.planning.architectures import Architecture
from tokenreduce.planning.cost import kv_bytes
from tokenreduce.planning.feasibility import read_later, spans
from tokenreduce.planning.memory import Peak, largest, prefill_peak
from tokenreduce.planning.plan import counts


@dataclass(frozen=True)
class Workload:
    """A pipeline as the search sees it."""

    account: Callable[[int], Account]
    """Token counts of every layer for so many frames. Raises BudgetError where the budget cannot be met."""
    read_later: Collection[int] = ()
    """Layers whose queries a stage reads before the attention of the next, see `prefill_peak`."""
    spans: Collection[int] = ()
    """Layers whose queries see a moving span of keys, see `prefill_peak`."""
    relative: bool = True
    """Whether the budget, if there is one, grows with the video."""


def dense(arch: Architecture) -> Workload:
    """No pipeline at all."""

    def account(frames: int) -> Account:
        total = arch.tokens(frames)
        tokens = [total] * arch.shape.layers
        return Account(None, arch.shape, total, arch.vision_tokens(frames), attn=tokens, ffn=tokens, kv=tokens)

    return Workload(account)


def reduced(pipeline: Pipeline, arch: Architecture, similar: float) -> Workload:
    """`pipeline` on `arch`. similar: see `tokenreduce.planning.plan.plan`."""
    stages = build(pipeline)
    return Workload(
        lambda frames: counts(pipeline, arch, frames, similar),
        read_later(stages, arch.shape.layers),
        spans(stages, arch.shape.layers),
        pipeline.budget is None or pipeline.budget.relative,
    )


def peak_of(arch: Architecture, load: Workload, frames: int, weights: int) -> Peak:
    """The worst moment of the prefill of `frames` frames. weights: their bytes."""
    account = load.account(frames)
    return prefill_peak(
        arch.shape, account.total, account.attn, account.ffn, account.kv, arch.dtype_bytes,
        weights=weights, held=arch.held(frames), read_later=load.read_later, spans=load.spans,
    )  # fmt: skip


def longest_video(arch: Architecture, load: Workload, memory: int) -> dict[str, Any]:
    """The largest video that fits in `memory` bytes, what ends it, and the parts of the worst moment there, in bytes.

    limit: `memory`, `positions` (the model was made for no more tokens) or `budget` (an absolute one that a longer video
    cannot meet). frames_by_memory: without regard to positions. needed: bytes that one frame more takes in all.
    """
    weights = arch.weight_bytes()

    def fits(frames: int) -> bool:
        try:
            return peak_of(arch, load, frames, weights).total <= memory
        except BudgetError:
            # A share is out of reach where the text outweighs a short video, an amount where the video is too long.
            return load.relative

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
            found["needed"] = peak_of(arch, load, frames + 1, weights).total
        except BudgetError:
            found["limit"] = "budget"
    if not frames:
        return found
    peak, account = peak_of(arch, load, frames, weights), load.account(frames)
    after = kv_bytes(arch.shape, account.kv, arch.dtype_bytes)
    return found | {"tokens": account.total} | asdict(peak) | {"total": peak.total, "kv_after": after}
