"""Stages at `kv` sites: what later queries may see of a layer, while all hidden states go on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Many
from typing import NamedTuple

import torch
from torch import Tensor

from tokenreduce.engine.cache.layers import KvPlan, TokenLayer, tokens_before
from tokenreduce.engine.forward.batch import Batch
from tokenreduce.engine.forward.looks import Looks
from tokenreduce.errors import PluginError, UnsupportedError
from tokenreduce.planning.account import SPAN_BLOCK, kv_pairs
from tokenreduce.reduction import Reduction
from tokenreduce.strategy import Site, Span

EVERYTHING = 1 << 40
"""A window that no sequence outgrows."""


class CacheCount(NamedTuple):
    """What a cache layer will hold of a row."""

    tokens: int | None = None
    """So many of the tokens that come; None: all of them."""
    span: bool = False
    """Whether because its queries see a moving span."""
    pairs: int | None = None
    """(query, key) pairs of its attention, where they are not those of all tokens with all that are held."""


def plan_kv(
    looks: Looks, batch: Batch, layer: int, cache: TokenLayer | None, x: Tensor, plan: KvPlan
) -> list[CacheCount]:
    """Ask the stages at `layer[l].kv` about x (B, m, D), the layer's input, and write into `plan` what is to happen.

    cache: the layer's KV cache, if there is one. Returns what it will hold of each row. What one row is given, span or weighting,
    is nothing to the others. UnsupportedError where stages act, and there is no cache.
    """
    site = Site(layer, "kv")
    width = x.shape[1]
    targets = torch.full(x.shape[:2], -1, dtype=torch.long, device=x.device)
    position = torch.full_like(targets, -1)
    spans: list[Span | None] = []
    counts: list[CacheCount] = []
    remain: list[Tensor | None] = []
    size = torch.ones_like(targets)
    past = tokens_before(cache, x.shape[0], x.device).to(x.device)
    totals = torch.tensor([s.total for s in batch.sequences], device=x.device)
    draft = torch.arange(width - batch.draft, width, device=x.device)
    targets[:, draft] = draft
    position[:, draft] = (past + totals)[:, None] + draft - width + batch.draft
    for sequence in batch.sequences:
        n, here = len(sequence), batch.columns_of(len(sequence), width)
        pad = here.start
        targets[sequence.row, here] = torch.arange(pad, here.stop, device=x.device)
        position[sequence.row, here] = sequence.alive + past[sequence.row]
        size[sequence.row, here] = sequence.size
        span: Span | None = None
        count: int | None = None
        kept: Tensor | None = None
        for run in sequence.conductor.due(site, sequence.__len__):
            decision = looks.ask(sequence, sequence.parts[0], run, site, x[sequence.row, here], None)
            if decision.reduction is not None:
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
            looks.record(sequence, sequence.parts[0], run, site, decision, n, n if count is None else count, 0)
        spans.append(span)
        counts.append(CacheCount(count, span is not None))
        remain.append(kept)
    plan.end = past + totals + batch.draft
    merged, bounded = any(kept is not None for kept in remain), any(span is not None for span in spans)
    if not merged and not bounded:
        known = cache is not None and cache.position is not None
        plan.position = position if known or batch.index is not None else None
        return [CacheCount()] * len(counts)
    plan.whole = not merged and _sees_all(batch, cache, spans)
    if not plan.whole:
        for row, (sequence, kept) in enumerate(zip(batch.sequences, remain, strict=True)):
            n, count = len(sequence), counts[row].tokens
            seen = kv_pairs(n, n if count is None else count, True) if kept is None else _pairs_in_blocks(kept)
            counts[row] = counts[row]._replace(pairs=seen)
    plan.position = position
    if merged:
        plan.reduction, plan.size = Reduction(targets), size
    if bounded:
        plan.span = _spans(cache, spans, x.device)
    if cache is None:
        raise UnsupportedError("stages at `kv` sites need a KV cache; call with use_cache=True")
    return counts


def _sees_all(batch: Batch, cache: TokenLayer | None, spans: Many[Span | None]) -> bool:
    """Whether the spans hide nothing yet, whose attention then is as it was, to the bit. Asks no tensor."""
    if cache is None or cache.gone or batch.index is not None or (cache.span is not None and None in spans):
        return False
    ends = [cache.held + sequence.total + batch.draft for sequence in batch.sequences]
    return all(span is None or span.sinks + span.window >= end for span, end in zip(spans, ends, strict=True))


def _check_first(name: str, site: Site, row: int, kept: Tensor, past: Tensor) -> None:
    """PluginError where the first token's query would find no key at all: `kept` (n,) leaves its own out, and none is older."""
    if not bool(kept[0]) and not int(past[row]):
        raise PluginError(
            f"strategy {name} at {site} leaves the first token of row {row} nothing to attend to; keep that token"
        )


def _spans(cache: TokenLayer | None, spans: Many[Span | None], device: torch.device) -> Tensor:
    """(B, 2) long, sinks and window. A row without vision tokens now goes on with the span it had, if it had one."""
    earlier = None if cache is None else cache.span
    before = [[0, EVERYTHING]] * len(spans) if earlier is None else earlier.tolist()
    now = [was if span is None else [span.sinks, span.window] for span, was in zip(spans, before, strict=True)]
    return torch.tensor(now, device=device)


def _pairs_in_blocks(kept: Tensor) -> int:
    """(query, key) pairs of `attend_by_position` where every query is alive and the `kept` (n,) of the keys are held."""
    seen = kept.cumsum(0).tolist()
    ends = [*range(SPAN_BLOCK, len(seen), SPAN_BLOCK), len(seen)]
    return sum((end - start) * seen[end - 1] for start, end in itertools.pairwise([0, *ends]))
