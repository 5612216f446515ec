"""Stages at `kv` sites: what later queries may see of a layer, while all hidden states go on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tokenreduce.engine.cache.layers import KvPlan
from tokenreduce.errors import PluginError, UnsupportedError
from tokenreduce.planning.account import SPAN_BLOCK, kv_pairs
from tokenreduce.reduction import Reduction
from tokenreduce.strategy import Site, Span

if TYPE_CHECKING:
    from tokenreduce.engine.forward.state import Forward

EVERYTHING = 1 << 40
"""A window that no sequence outgrows."""


class Held(NamedTuple):
    """What the cache will hold of a row: tokens, None for everything. span: because its queries see a moving span."""

    tokens: int | None = None
    span: bool = False


def plan_kv(forward: Forward, layer: int, x: Tensor, plan: KvPlan) -> list[Held]:
    """Ask the stages at `layer[l].kv` about x (B, m, D), the layer's input, and write into `plan` what is to happen.

    Returns what the cache will hold of each row. What one row is given, span or weighting, is nothing to the others.
    """
    site = Site(layer, "kv")
    width = x.shape[1]
    targets = torch.full(x.shape[:2], -1, dtype=torch.long, device=x.device)
    position = torch.full_like(targets, -1)
    spans: list[Span | None] = []
    held: list[Held] = []
    remain: list[Tensor | None] = []
    size = torch.ones_like(targets)
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
        span: Span | None = None
        count: int | None = None
        kept: Tensor | None = None
        for run in sequence.conductor.due(site, sequence.__len__):
            decision = forward.decide(sequence, run, site, x[sequence.row, here])
            if decision.reduction is not None:
                sequence.check(run.strategy.name, site, decision.reduction)
                target, stays = decision.reduction.target[0], decision.reduction.kept[0]
                targets[sequence.row, here] = torch.where(target >= 0, target + pad, -1)
                count = int(stays.sum())
                if count < n:
                    kept = stays
                    _check_first(run.strategy.name, site, sequence.row, stays, past)
                if decision.reduction.weighting == "plain":
                    size[sequence.row, here] = 1
            if isinstance(decision.span, Span):
                span = decision.span
                count = min(span.sinks + span.window, n)
            forward.record(sequence, run, site, decision, n, n if count is None else count, 0)
        spans.append(span)
        held.append(Held(count, span is not None))
        remain.append(kept)
    plan.end = past + totals + forward.draft
    merged, bounded = any(kept is not None for kept in remain), any(span is not None for span in spans)
    if not merged and not bounded:
        known = bool(forward.layers) and forward.layers[layer].position is not None
        plan.position = position if known or forward.index is not None else None
        return [Held()] * len(held)
    plan.whole = not merged and _sees_all(forward, layer, spans)
    for sequence, kept, (count, _) in zip(forward.sequences, remain, held, strict=True):
        if not plan.whole:
            n = len(sequence)
            seen = kv_pairs(n, n if count is None else count, True) if kept is None else _pairs_in_blocks(kept)
            forward.pairs[layer, sequence.row] = seen
    plan.position = position
    if merged:
        plan.reduction, plan.size = Reduction(targets), size
    if bounded:
        plan.span = _spans(forward, layer, spans, x.device)
    if not forward.layers:
        raise UnsupportedError("stages at `kv` sites need a KV cache; call with use_cache=True")
    return held


def _sees_all(forward: Forward, layer: int, spans: Many[Span | None]) -> bool:
    """Whether the spans hide nothing yet, whose attention then is as it was, to the bit. Asks no tensor."""
    held = forward.layers[layer] if forward.layers else None
    if held is None or held.gone or forward.index is not None or (held.span is not None and None in spans):
        return False
    ends = [held.held + sequence.total + forward.draft for sequence in forward.sequences]
    return all(span is None or span.sinks + span.window >= end for span, end in zip(spans, ends, strict=True))


def _check_first(name: str, site: Site, row: int, kept: Tensor, past: Tensor) -> None:
    """PluginError where the first token's query would find no key at all: `kept` (n,) leaves its own out, and none is older."""
    if not bool(kept[0]) and not int(past[row]):
        raise PluginError(
            f"strategy {name} at {site} leaves the first token of row {row} nothing to attend to; keep that token"
        )


def _spans(forward: Forward, layer: int, spans: Many[Span | None], device: torch.device) -> Tensor:
    """(B, 2) long, sinks and window. A row without vision tokens now goes on with the span it had, if it had one."""
    earlier = forward.layers[layer].span if forward.layers else None
    before = [[0, EVERYTHING]] * len(spans) if earlier is None else earlier.tolist()
    now = [was if span is None else [span.sinks, span.window] for span, was in zip(spans, before, strict=True)]
    return torch.tensor(now, device=device)


def _pairs_in_blocks(kept: Tensor) -> int:
    """(query, key) pairs of `attend_by_position` where every query is alive and the `kept` (n,) of the keys are held."""
    seen = kept.cumsum(0).tolist()
    ends = [*range(SPAN_BLOCK, len(seen), SPAN_BLOCK), len(seen)]
    return sum((end - start) * seen[end - 1] for start, end in itertools.pairwise([0, *ends]))
