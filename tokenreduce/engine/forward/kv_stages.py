"""Stages at `kv` sites: what later queries may see of a layer, while all hidden states go on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Many
from typing import NamedTuple

import torch
from torch import Tensor

from tokenreduce.engine.cache.layers import KvPlan, TokenLayer, shared, tokens_before
from tokenreduce.engine.forward.batch import Batch
from tokenreduce.engine.forward.looks import Ask, Looks, rounds
from tokenreduce.engine.forward.sequence import TokenSequence
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
    facts = _facts(batch, cache, x)
    spans: list[Span | None] = [None] * len(batch.sequences)
    counts = [CacheCount()] * len(batch.sequences)
    reductions: dict[int, Reduction] = {}
    for now in rounds(batch.sequences, site):
        asked = [Ask(s, part, run, x[s.row, batch.columns_of(len(s), x.shape[1])]) for s, part, run in now]
        for ask, decision in zip(asked, looks.ask(asked, site), strict=True):
            sequence, n, count = ask.sequence, len(ask.sequence), None
            row = sequence.row
            if decision.reduction is not None:
                assert decision.reduction.counts is not None
                reductions[row], count = decision.reduction, decision.reduction.counts[0]
            if decision.span is not None:
                spans[row], count = decision.span, min(decision.span.sinks + decision.span.window, n)
            looks.record(sequence, ask.part, ask.run, site, decision, n, n if count is None else count, 0)
            counts[row] = CacheCount(count, spans[row] is not None)
    plan.end = facts.end
    going = {s.row for s in batch.sequences if s.row in reductions and counts[s.row].tokens < len(s)}  # type: ignore[operator]
    bounded = any(span is not None for span in spans)
    if not going and not bounded:
        known = cache is not None and cache.position is not None
        plan.position = facts.position if known or batch.index is not None else None
        return [CacheCount()] * len(counts)
    plan.whole = not going and _sees_all(batch, cache, spans)
    plan.position = facts.position
    kept: dict[int, Tensor] = {}
    if going:
        kept = _reduce(batch, reductions, facts, plan, site, x.shape[1])
    if not plan.whole:
        for sequence in batch.sequences:
            n, row = len(sequence), sequence.row
            count = counts[row].tokens
            seen = _pairs_in_blocks(kept[row]) if row in going else kv_pairs(n, n if count is None else count, True)
            counts[row] = counts[row]._replace(pairs=seen)
    if bounded:
        _bound(cache, spans, batch, plan, x.device)
    if cache is None:
        raise UnsupportedError("stages at `kv` sites need a KV cache; call with use_cache=True")
    return counts


class Facts(NamedTuple):
    """What all layers with the same tokens in their caches share. m columns in each of B rows."""

    position: Tensor
    """(B, m) long, place of each token in its sequence, earlier turns included; −1 on padding."""
    past: Tensor
    """(B,) long, tokens of earlier turns."""
    end: Tensor
    """(B,) long, position after the last token, the draft included."""


def _facts(batch: Batch, cache: TokenLayer | None, x: Tensor) -> Facts:
    def make() -> Facts:
        rows, width, device = x.shape[0], x.shape[1], x.device
        past = tokens_before(cache, rows, device).to(device)
        end = past + torch.tensor([s.total + batch.draft for s in batch.sequences], device=device)
        position = torch.full((rows, width), -1, dtype=torch.long, device=device)
        for sequence in batch.sequences:
            position[sequence.row, batch.columns_of(len(sequence), width)] = sequence.alive + past[sequence.row]
        if batch.draft:
            position[:, width - batch.draft :] = end[:, None] + torch.arange(-batch.draft, 0, device=device)
        return Facts(position, past, end)

    held = None if cache is None else (cache.held, cache.end, cache.not_padding)
    number, *parts = held or (0, None, None)
    key = ("facts", number, x.device)
    return shared(batch.known, key, (*parts, *(s.alive for s in batch.sequences)), make)  # type: ignore[no-any-return]


def _reduce(
    batch: Batch, reductions: dict[int, Reduction], facts: Facts, plan: KvPlan, site: Site, width: int
) -> dict[int, Tensor]:
    """Write the reductions of all rows into `plan` as one. Returns which tokens are kept, (n,) bool on the CPU, of each row.

    One copy to the host for the whole batch: it tells how many keys each block of queries can see.
    """
    device = facts.position.device
    everything = torch.arange(width, device=device)
    targets = torch.where(facts.position >= 0, everything, -1)
    size = torch.ones_like(targets)
    for sequence in batch.sequences:
        here = batch.columns_of(len(sequence), width)
        size[sequence.row, here] = sequence.size
        reduction = reductions.get(sequence.row)
        if reduction is not None:
            target = reduction.target[0]
            targets[sequence.row, here] = torch.where(target >= 0, target + here.start, -1)
            if reduction.weighting == "plain":
                size[sequence.row, here] = 1
    # With them, whether a token of an earlier turn is there for a first query whose own key goes.
    stays, past = torch.cat([(targets == everything).long(), facts.past[:, None]], 1).cpu().split([width, 1], 1)
    totals, kept = stays.sum(1).tolist(), {}
    for sequence in batch.sequences:
        row = sequence.row
        kept[row] = stays[row, batch.columns_of(len(sequence), width)].bool()
        if not kept[row][0] and not int(past[row]):
            raise PluginError(
                f"strategy {_names(sequence, site)} at {site} leaves the first token of row {row} nothing to attend to; keep "
                "that token"
            )
    plan.reduction = Reduction(targets, counts=tuple(totals))
    plan.size = size
    longest = max(totals)
    missing = longest - torch.tensor(totals)
    blocks = [*range(SPAN_BLOCK, width, SPAN_BLOCK), width]
    plan.borders = (stays.cumsum(1) + missing[:, None]).amax(0)[torch.tensor(blocks) - 1].tolist()
    return kept


def _names(sequence: TokenSequence, site: Site) -> str:
    return ", ".join(run.strategy.name for run in sequence.conductor.runs if site in run.sites)


def _bound(
    cache: TokenLayer | None, spans: Many[Span | None], batch: Batch, plan: KvPlan, device: torch.device
) -> None:
    """Write the spans of all rows into `plan`. A row without vision tokens now goes on with the span it had, if it had one."""
    earlier = None if cache is None else cache.span
    given = tuple((0, EVERYTHING) if span is None else (span.sinks, span.window) for span in spans)
    key = ("span", given, device)
    plan.span = shared(batch.known, key, (), lambda: torch.tensor(given, device=device))
    plan.uniform = len(set(given)) == 1
    sinks, windows = zip(*given, strict=True)
    if earlier is not None and cache is not None and None in spans:
        new = torch.tensor([[span is not None] for span in spans], device=device)
        plan.span = torch.where(new, plan.span, earlier.to(device))
        plan.uniform = False
        sinks, windows = (*sinks, cache.limit[0]), (*windows, cache.limit[1])
    plan.limit = max(sinks), max(windows)
    if (cache is None or not cache.held) and batch.index is None and plan.reduction is None:
        plan.shortest = min(len(sequence) for sequence in batch.sequences) + batch.draft


def _sees_all(batch: Batch, cache: TokenLayer | None, spans: Many[Span | None]) -> bool:
    """Whether the spans hide nothing yet, whose attention then is as it was, to the bit. Asks no tensor."""
    if cache is None or cache.gone or batch.index is not None or (cache.span is not None and None in spans):
        return False
    ends = [cache.held + sequence.total + batch.draft for sequence in batch.sequences]
    return all(span is None or span.sinks + span.window >= end for span, end in zip(spans, ends, strict=True))


def _pairs_in_blocks(kept: Tensor) -> int:
    """(query, key) pairs of `attend_by_position` where every query is alive and the `kept` (n,) of the keys are held."""
    seen = kept.cumsum(0).tolist()
    ends = [*range(SPAN_BLOCK, len(seen), SPAN_BLOCK), len(seen)]
    return sum((end - start) * seen[end - 1] for start, end in itertools.pairwise([0, *ends]))
