"""Stages at `decode` sites: what a layer's KV cache holds on, asked every so many steps of decoding.

Each layer keeps the rotated queries of the steps since it was last asked. When it is, the attention of all of them comes from one
product: no key is dropped in between. What the held tokens are, a layer remembers from the prefill on.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from tokenreduce.engine.cache.layers import TokenLayer
from tokenreduce.engine.forward.batch import Batch
from tokenreduce.engine.forward.looks import notify_observers
from tokenreduce.errors import PluginError, UnsupportedError
from tokenreduce.ops.attention import attention_rows
from tokenreduce.plugin_checks import as_decision, check_heads, check_reduction, decide_with, lent
from tokenreduce.reduction import Reduction
from tokenreduce.strategy import Heads, Queries, Rows, Site, StageContext, Strategy
from tokenreduce.trace import StageTrace

Held = tuple[Tensor, Tensor, Tensor]
"""Of a row: keys and values (G, m, d), and what the tokens are (m, 4), see TokenLayer.told."""
TEXT = (-1, -1, -1, 0)
UNKNOWN = (-2, -1, -1, 0)
"""Of tokens in whose place the heads hold different ones."""


def remember(cache: TokenLayer, batch: Batch, width: int) -> None:
    """Note what the `width` tokens are that a prefill has put into `cache`."""
    held, device = cache.held, cache.keys.device
    told = torch.tensor(TEXT, device=device).repeat(cache.keys.shape[0], held, 1)
    if cache.told is not None:
        told[:, : cache.told.shape[1]] = cache.told
    for sequence in batch.sequences:
        here = batch.columns_of(len(sequence), width)
        facts = (sequence.slot, sequence.frame, sequence.medium, sequence.reducible.long())
        place = slice(held - width + here.start, held - width + here.stop)
        told[sequence.row, place] = torch.stack([fact[sequence.alive] for fact in facts], 1).to(device)
    cache.told, cache.recent = told, []


def step(
    strategies: Mapping[int, Strategy],
    depth: int,
    layer: int,
    cache: TokenLayer | None,
    query: Tensor,
    kwargs: dict[str, Any],
) -> None:
    """A step of decoding has attended with query (B, H, 1, d) at `layer`: ask its stage, if it is time."""
    strategy = strategies.get(layer)
    if strategy is None:
        return
    if cache is None or cache.position is not None:
        raise UnsupportedError("stages at `decode` sites need a KV cache that no `kv` stage has changed")
    cache.recent.append(query.detach())
    if len(cache.recent) < getattr(strategy.config, "every", 1):
        return
    queries, cache.recent = torch.cat(cache.recent, 2), []
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    valid, told = cache.valid, _told(cache)
    rows: list[Held] = []
    events: list[StageTrace] = []
    for row in range(len(query)):
        keys, values, facts = cache.keys[row], cache.values[row], told[row]
        if valid is not None:
            keys, values, facts = keys[:, valid[row]], values[:, valid[row]], facts[valid[row]]
        rows.append(
            _asked(strategy, Site(layer, "decode"), depth, row, queries[row], scale, (keys, values, facts), events)
        )
    if any(event.after < event.before for event in events):
        _hold(cache, rows)
    notify_observers(events)


def _told(cache: TokenLayer) -> Tensor:
    """(B, held, 4): what the tokens are; those that came since are text."""
    rows, held = cache.keys.shape[0], cache.held
    told = torch.tensor(TEXT, device=cache.keys.device).repeat(rows, held, 1)
    if cache.told is not None:
        told[:, : cache.told.shape[1]] = cache.told
    return told


def _asked(
    strategy: Strategy,
    site: Site,
    depth: int,
    row: int,
    query: Tensor,
    scale: float,
    held: Held,
    events: list[StageTrace],
) -> Held:
    """What is left of a row. query: (H, r, d) of the steps since."""
    keys, values, facts = held
    n, who, free = keys.shape[1], f"strategy {strategy.name} at {site}", strategy.capabilities.text
    reducible = torch.ones(n, dtype=torch.bool, device=keys.device) if free else facts[:, 3] > 0
    if not free and bool((facts[:, 0] == UNKNOWN[0]).any()):
        raise UnsupportedError(
            f"{who}: the KV heads of this layer hold different tokens, so which of them are vision is not known; let it act at "
            "layers without a `cache` stage by heads, or declare Capabilities(text=True)"
        )
    count = int(reducible.sum())
    if not count:
        return held
    ctx = StageContext(
        site=site,
        depth=depth,
        hidden=lent(keys.new_zeros(n, 0)),
        slot=facts[:, 0].clone(),
        frame=facts[:, 1].clone(),
        medium=facts[:, 2].clone(),
        position=torch.arange(n, device=keys.device),
        size=torch.ones(n, dtype=torch.long, device=keys.device),
        reducible=reducible,
        reducible_count=count,
        original_reducible=count,
        attention_source=partial(_attention, query, keys, scale),
        held_source=partial(_pair, keys, values),
    )
    decision = as_decision(who, site, decide_with(who, strategy.decide, ctx))
    reduction, left = decision.reduction, n
    if reduction is not None:
        _check(who, reduction, reducible, len(keys), n)
        each = Reduction(reduction.target.expand(len(keys), -1), reduction.weighting, merges=reduction.merges)
        sizes = torch.ones(len(keys), n, dtype=torch.long, device=keys.device)
        both = each.apply(torch.cat([keys, values], -1), sizes)
        assert both.hidden is not None
        left = both.hidden.shape[1]
        alike = bool((reduction.target == reduction.target[:1]).all())
        if not (alike or free):
            raise PluginError(
                f"{who} lets heads differ, which only a stage that may drop text can: Capabilities(text=True)"
            )
        told = facts[reduction.kept[0]] if alike else torch.tensor(UNKNOWN, device=keys.device).repeat(left, 1)
        held = both.hidden[..., : keys.shape[-1]], both.hidden[..., keys.shape[-1] :], told
    events.append(
        StageTrace(
            stage=strategy.place, strategy=strategy.name, site=str(site), layer=site.layer, row=row, before=n, after=left,
            merged=0, dropped=n - left, finished=False, note=decision.note,
        )
    )  # fmt: skip
    return held


def _check(who: str, reduction: Reduction, reducible: Tensor, groups: int, n: int) -> None:
    own = isinstance(reduction.target, Tensor) and reduction.target.shape[:1] == (groups,)
    check_reduction(who, reduction, (groups if own else 1, n), reducible.device)
    check_heads(who, reduction.kept)
    if reduction.mixture is not None:
        raise PluginError(f"{who} merges by a mixture, which goes with hidden states alone")
    into = reduction.target.clamp(min=0)
    if not bool((reduction.kept | (reducible & ((reduction.target < 0) | reducible[into]))).all()):
        raise PluginError(f"{who} removes a token that must stay (text or protected); Capabilities(text=True) may")


def _pair(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return keys, values


def _attention(
    query: Tensor,
    keys: Tensor,
    scale: float,
    queries: Queries | Tensor,
    heads: Heads | Literal["each"],
    rows: Rows = "sum",
) -> Tensor:
    """See StageContext.attention: the rows are the steps since the stage was last asked."""
    if isinstance(queries, Tensor):
        raise ValueError("at `decode` sites queries are last, all (since the last look), or the last so many steps")
    steps = query.shape[1]
    count = steps if queries == "all" else 1 if queries == "last" else min(int(queries), steps)
    return attention_rows(query, keys, scale, torch.arange(steps - count, steps, device=query.device), heads, rows)


def _hold(cache: TokenLayer, rows: list[Held]) -> None:
    """Hold of each row what is left, padded in front."""
    logical, longest = cache.logical, max(keys.shape[1] for keys, _, _ in rows)
    counts = [keys.shape[1] for keys, _, _ in rows]

    def padded(parts: list[Tensor], axis: int) -> Tensor:
        out = []
        for part in parts:
            gap = list(part.shape)
            gap[axis] = longest - part.shape[axis]
            out.append(torch.cat([part.new_zeros(gap), part], axis))
        return torch.stack(out)

    device = cache.keys.device
    cache.keys, cache.values = padded([row[0] for row in rows], 1), padded([row[1] for row in rows], 1)
    cache.told = padded([row[2] for row in rows], 0)
    cache.not_padding, cache.gapless, cache.regular = None, False, False
    if len(set(counts)) > 1:
        missing = torch.tensor([longest - count for count in counts], device=device)
        cache.not_padding = torch.arange(longest, device=device) >= missing[:, None]
    cache.gone, cache.reduced = logical - cache.held, True
