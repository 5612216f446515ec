"""Stages at `cache` sites: what a layer's KV cache holds on after its attention, perhaps another choice for each KV head.

The layer's own output is untouched. All heads of a row hold equally many tokens, so that masks stay one per row, and decoding
without padding needs none; rows and layers may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tokenreduce.engine.cache.layers import TokenLayer, lengthened
from tokenreduce.engine.forward.batch import Batch
from tokenreduce.engine.forward.looks import Ask, Looks
from tokenreduce.engine.forward.sequence import TokenSequence
from tokenreduce.errors import UnsupportedError
from tokenreduce.reduction import Reduction
from tokenreduce.strategy import Site

Held = tuple[Tensor, Tensor]
"""Keys and values (G, m, d) of a row."""


def hold_less(
    looks: Looks, batch: Batch, layer: int, cache: TokenLayer | None, x: Tensor, attention: Callable[..., Tensor] | None
) -> bool:
    """Ask the stages at `layer[l].cache`, whose attention has run over x (B, m, D), and let `cache` hold what they say.

    attention: see AttentionSource; None where no stage here reads. Whether the cache has changed.
    """
    site = Site(layer, "cache")
    due = [(sequence, run) for sequence in batch.sequences for run in sequence.conductor.due(site, sequence.__len__)]
    if not due:
        return False
    if cache is None:
        raise UnsupportedError("stages at `cache` sites need a KV cache; call with use_cache=True")
    width, new = x.shape[1], cache.held - x.shape[1]
    rows: dict[int, Held] = {}
    kept: dict[int, Tensor] = {}
    for sequence, run in due:
        here = batch.columns_of(len(sequence), width)
        place = slice(new + here.start, new + here.stop)
        keys, values = cache.keys[sequence.row, :, place], cache.values[sequence.row, :, place]
        part = sequence.parts[0]
        ask = Ask(sequence, part, run, x[sequence.row, here], attention, partial(_pair, keys, values))
        (decision,) = looks.ask([ask], site)
        n = count = len(sequence)
        merged, reduction = 0, decision.reduction
        if reduction is not None:
            counts = reduction.kept.sum(1)
            count = int(counts[0])
            if count < n:
                rows[sequence.row] = _reduced(reduction, sequence, keys, values)
                if cache.told is not None and bool((reduction.target == reduction.target[:1]).all()):
                    kept[sequence.row] = reduction.kept[0]
                merged = n - count - int((reduction.target[0] < 0).sum()) if reduction.merges else 0
                sequence.conductor.account.kv[-1] = count
        looks.record(sequence, sequence.parts[0], run, site, decision, n, count, merged)
    if rows:
        told = None if cache.told is None else _told(cache, batch, width, rows, kept)
        _hold(cache, batch, width, rows)
        cache.told = told
    return bool(rows)


def _pair(keys: Tensor, values: Tensor) -> Held:
    return keys, values


def _reduced(reduction: Reduction, sequence: TokenSequence, keys: Tensor, values: Tensor) -> Held:
    """Keys and values (G, n, d) after a reduction, heads as its rows."""
    groups, _, width = keys.shape
    target = reduction.target.expand(groups, -1)
    counts = None if reduction.counts is None else (reduction.counts[0],) * groups
    each = Reduction(target, reduction.weighting, counts, reduction.merges)
    left = each.apply(torch.cat([keys, values], -1), sequence.size.to(keys.device).expand(groups, -1))
    assert left.hidden is not None
    return left.hidden[..., :width], left.hidden[..., width:]


def _told(cache: TokenLayer, batch: Batch, width: int, rows: dict[int, Held], kept: dict[int, Tensor]) -> Tensor:
    """`cache.told` after `_hold`. Where the heads of a row differ, its new tokens are told as unknown."""
    assert cache.told is not None
    past = cache.held - width
    parts = []
    for sequence in batch.sequences:
        here = batch.columns_of(len(sequence), width)
        facts = cache.told[sequence.row, past + here.start : past + here.stop]
        if sequence.row in kept:
            facts = facts[kept[sequence.row]]
        elif sequence.row in rows:
            facts = facts.new_tensor((-2, -1, -1, 0)).repeat(rows[sequence.row][0].shape[1], 1)
        parts.append(facts)
    longest = max(map(len, parts))
    out = cache.told.new_tensor((-1, -1, -1, 0)).repeat(len(parts), past + longest + batch.draft, 1)
    out[:, :past] = cache.told[:, :past]
    for row, facts in enumerate(parts):
        out[row, past + longest - len(facts) : past + longest] = facts
    return out


def _hold(cache: TokenLayer, batch: Batch, width: int, rows: dict[int, Held]) -> None:
    """Put the new tokens that are left in the place of all new tokens: padding, then they, then the draft.

    Earlier tokens keep their columns, so that a forward that fails can be undone by their number.
    """
    past, logical = cache.held - width, cache.logical
    full: list[Held] = []
    for sequence in batch.sequences:
        here = batch.columns_of(len(sequence), width)
        place = slice(past + here.start, past + here.stop)
        own = rows.get(sequence.row)
        full.append((cache.keys[sequence.row, :, place], cache.values[sequence.row, :, place]) if own is None else own)
    longest = max(keys.shape[1] for keys, _ in full)
    draft = slice(past + width - batch.draft, past + width)

    def joined(old: Tensor, parts: list[Tensor]) -> Tensor:
        out = old.new_zeros(*old.shape[:2], past + longest + batch.draft, old.shape[-1])
        out[:, :, :past] = old[:, :, :past]
        out[:, :, past + longest :] = old[:, :, draft]
        for row, part in enumerate(parts):
            out[row, :, past + longest - part.shape[1] : past + longest] = part
        return out

    before = cache.valid
    keys = joined(cache.keys, [keys for keys, _ in full])
    cache.values = joined(cache.values, [values for _, values in full])
    cache.keys = keys
    counts = torch.tensor([part.shape[1] for part, _ in full], device=keys.device)
    fresh = torch.arange(longest, device=keys.device) >= (longest - counts)[:, None]
    cache.not_padding = None
    if before is not None or bool((counts != longest).any()):
        earlier = fresh.new_ones(len(full), past) if before is None else before[:, :past]
        cache.not_padding = torch.cat([earlier, fresh], 1)
        if bool(cache.not_padding.all()):
            cache.not_padding = None
    cache.gone, cache.reduced, cache.gapless, cache.regular = logical - cache.held, True, False, False


def held_before(cache: TokenLayer | None, keys: int, rows: int, device: torch.device) -> Tensor | None:
    """(B, keys) bool: what of the keys of an attention is no padding, as the cache says before a stage changes it."""
    if cache is None:
        return None
    if cache.not_padding is None:
        return torch.ones(rows, keys, dtype=torch.bool, device=device)
    return lengthened(cache.not_padding, keys)
