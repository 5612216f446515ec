"""Stages at `kv` sites: what later queries may see of a layer, while all hidden states go on."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenreduce.budget import SPAN_BLOCK, kv_pairs
from tokenreduce.engine.cache import KvPlan
from tokenreduce.errors import UnsupportedError
from tokenreduce.reduction import Reduction, Weighting
from tokenreduce.strategy import Site, Span

if TYPE_CHECKING:
    from tokenreduce.engine.forward import Forward

EVERYTHING = 1 << 40
"""A window that no sequence outgrows."""


def plan_kv(forward: Forward, layer: int, x: Tensor, plan: KvPlan) -> list[int | None]:
    """Ask the stages at `layer[l].kv` about x (B, m, D), the layer's input, and write into `plan` what is to happen.

    Returns what the cache will hold of each row, None for everything.
    """
    site = Site(layer, "kv")
    width = x.shape[1]
    targets = torch.full(x.shape[:2], -1, dtype=torch.long, device=x.device)
    position = torch.full_like(targets, -1)
    windows, held, remain = [], [], []
    sinks = 0
    size = torch.ones_like(targets)
    weighting: Weighting | None = None
    past = forward.past(layer, x.shape[0], x.device)
    totals = torch.tensor([s.total for s in forward.sequences], device=x.device)
    draft = torch.arange(width - forward.draft, width, device=x.device)
    targets[:, draft] = draft
    position[:, draft] = (past + totals)[:, None] + draft - width + forward.draft
    for sequence in forward.sequences:
        n, here = len(sequence), forward.here(len(sequence), width)
        pad = here.start
        targets[sequence.row, here] = torch.arange(pad, here.stop, device=x.device)
        position[sequence.row, here] = sequence.alive + past[sequence.row]
        size[sequence.row, here] = sequence.size
        window: int | None = None
        count: int | None = None
        kept = torch.ones(n, dtype=torch.bool, device=x.device)
        for run in sequence.conductor.due(site, sequence.__len__):
            decision = forward.decide(sequence, run, site, x[sequence.row, here])
            if decision.reduction is not None:
                sequence.check(run.strategy.name, site, decision.reduction)
                target, kept = decision.reduction.target[0], decision.reduction.kept[0]
                targets[sequence.row, here] = torch.where(target >= 0, target + pad, -1)
                count = int(kept.sum())
                if count < n:
                    weighting = decision.reduction.weighting
            if isinstance(decision.span, Span):
                window, sinks = decision.span.window, decision.span.sinks
                count = min(sinks + window, n)
            forward.record(sequence, run, site, decision, n, n if count is None else count, 0)
        windows.append(window)
        held.append(count)
        remain.append(kept)
    plan.end = past + totals + forward.draft
    if weighting is None and all(window is None for window in windows):
        known = bool(forward.layers) and forward.layers[layer].position is not None
        plan.position = position if known or forward.index is not None else None
        return [None] * len(held)
    plan.whole = weighting is None and _sees_all(forward, layer, windows, sinks)
    for sequence, kept, count in zip(forward.sequences, remain, held, strict=True):
        if not plan.whole:
            n = len(sequence)
            seen = kv_pairs(n, min(count or n, n), True) if weighting is None else _pairs_in_blocks(kept)
            forward.pairs[layer, sequence.row] = seen
    plan.position = position
    if weighting is not None:
        plan.reduction, plan.size = Reduction(targets, weighting), size
    if any(window is not None for window in windows):
        # A row without vision tokens now goes on with the span it had, if it had one.
        earlier = forward.layers[layer].window if forward.layers else None
        before = [EVERYTHING] * len(windows) if earlier is None else earlier.tolist()
        now = [was if w is None else w for w, was in zip(windows, before, strict=True)]
        plan.window = torch.tensor(now, device=x.device)
        plan.sinks = sinks
    if not forward.layers:
        raise UnsupportedError("stages at `kv` sites need a KV cache; call with use_cache=True")
    return held


def _sees_all(forward: Forward, layer: int, windows: list[int | None], sinks: int) -> bool:
    """Whether the spans hide nothing yet, whose attention then is as it was, to the bit. Asks no tensor."""
    held = forward.layers[layer] if forward.layers else None
    if held is None or held.gone or forward.index is not None or (held.window is not None and None in windows):
        return False
    ends = [held.held + sequence.total + forward.draft for sequence in forward.sequences]
    return all(window is None or sinks + window >= end for window, end in zip(windows, ends, strict=True))


def _pairs_in_blocks(kept: Tensor) -> int:
    """(query, key) pairs of `attend_by_position` where every query is alive and the `kept` (n,) of the keys are held."""
    seen = kept.cumsum(0).tolist()
    ends = [*range(SPAN_BLOCK, len(seen), SPAN_BLOCK), len(seen)]
    return sum((end - start) * seen[end - 1] for start, end in itertools.pairwise([0, *ends]))
