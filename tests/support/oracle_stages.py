"""Which stage of a pipeline acts where, and what its budget leaves, written a second time: the middle part of the oracle.

Nothing of tokenreduce is imported. What each strategy decides is in `oracle_strategies`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

KINDS = ("pre_attention", "kv", "pre_ffn")
Site = tuple[int, str]
SPAN_BLOCK = 128
"""Queries that share their keys in an attention over a span; a FLOPs budget pays for them."""


@dataclass(frozen=True)
class Shape:
    """Widths of a decoder, and bytes of one cached number."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    bytes: int


NOWHERE = torch.zeros(0)


@dataclass(frozen=True)
class Token:
    """One token. column: in the input. position: in its turn. place: in the conversation. members: columns it stands for."""

    column: int
    slot: int = -1
    frame: int = -1
    medium: int = -1
    reducible: bool = False
    deepstack: tuple[Tensor, ...] = ()
    size: int = 1
    position: int = 0
    place: int = 0
    members: tuple[int, ...] = ()
    cos: Tensor = NOWHERE
    sin: Tensor = NOWHERE


@dataclass
class Choice:
    """target[i]: i stays, j ≠ i is where i goes, −1 is dropped; empty for no change. span: (sinks, window)."""

    target: list[int] = field(default_factory=list)
    weighted: bool = True
    span: tuple[int, int] | None = None
    finished: bool = False
    budget_met: bool = False
    consumed: bool = True


@dataclass
class Look:
    """What a stage sees: tokens alive, their states (n, D), the last attention (heads, queries, keys) among `asked`."""

    tokens: list[Token]
    x: Tensor
    probs: Tensor | None
    asked: list[Token]

    @property
    def reducible(self) -> list[int]:
        return [i for i, token in enumerate(self.tokens) if token.reducible]


@dataclass
class Stage:
    """One stage of a pipeline and how far it is in this turn."""

    config: dict[str, Any]
    sites: list[Site]
    done: bool = False
    free_from: tuple[int, int] = (0, 0)
    span: int | None = None

    @property
    def rule(self) -> Rule:
        return RULES[self.config["strategy"]]

    @property
    def once(self) -> bool:
        return self.rule.waits and self.config.get("at") in (None, "next")

    @property
    def solved(self) -> bool:
        """Whether a budget says how much it keeps."""
        return self.config.get("keep") is None and self.config.get("threshold") is None


def order(site: Site) -> tuple[int, int]:
    return site[0], KINDS.index(site[1])


def sites_of(config: dict[str, Any], depth: int) -> list[Site]:
    """Where a stage may act."""
    rule, at = RULES[config["strategy"]], config.get("at")
    kind = config.get("site") or rule.kind
    begin, end = config.get("from") or 0, config.get("until")
    if config["strategy"] == "similarity_merge" and at is None and config.get("site") is None:
        if config.get("threshold") is None:
            return [(begin, "pre_attention")]
        last = depth if end is None else end + 1
        return [(begin, "pre_attention"), *((layer, "pre_ffn") for layer in range(begin, last))]
    if isinstance(at, int):
        return [(at, kind)]
    if isinstance(at, (list, tuple)):
        return [(layer, kind) for layer in at]
    if rule.attention and kind == "pre_attention":
        begin = max(begin, 1)
    return [(layer, kind) for layer in range(begin, depth if end is None else end + 1)]


class Plan:
    """The stages of one row in one turn, and what the row has spent of its budget."""

    def __init__(self, pipeline: dict[str, Any], shape: Shape, tokens: list[Token]) -> None:
        self.shape = shape
        self.total, self.vision = len(tokens), sum(token.reducible for token in tokens)
        self.fixed = self.total - self.vision
        self.budget = pipeline.get("budget")
        self.stages = [Stage(stage, sites_of(stage, shape.layers)) for stage in pipeline["stages"]]
        self.attn: list[int] = []
        self.ffn: list[int] = []
        self.kv: list[int] = []
        self.pairs: list[int] = []
        self.selector = 0
        self.margin = math.inf

    # Whose turn it is -------------------------------------------------------------------------------------------------

    def due(self, site: Site, alive: Callable[[], int]) -> Iterator[Stage]:
        """Stages that act at `site`."""
        for place, stage in enumerate(self.stages):
            if stage.done or site not in stage.sites:
                continue
            if stage.once:
                before = self.stages[:place]
                free = order(site) >= stage.free_from and all(other.done for other in before)
                if not free and not self._last_chance(stage, site, alive()):
                    continue
                for other in before:
                    other.done = True
            yield stage

    def _last_chance(self, stage: Stage, site: Site, alive: int) -> bool:
        later = [other for other in stage.sites if order(other) > order(site)]
        if not later:
            return True
        if self.budget is None or not stage.solved:
            return False
        changes, readers = {later[0]: self.fixed + 1}, [(later[0], stage)]
        for other in self.stages[: self.stages.index(stage)]:
            for at in other.sites:
                if other.done or other.once or not order(site) < order(at) <= order(later[0]):
                    continue
                readers.append((at, other))
                keep = other.config.get("keep")
                if at[1] != "kv" and (other.solved or keep is not None):
                    share = keep[other.sites.index(at)] if isinstance(keep, (list, tuple)) else keep or 0
                    count = self.fixed + max(math.floor(Fraction(repr(share)) * self.vision), 1)
                    changes[at] = min(count, changes.get(at, count))
        return self.project(alive, changes, readers) > self.limit

    def readers(self, stage: Stage, site: Site) -> list[tuple[Site, Stage]]:
        """Stages that look at attention after `stage` at `site`: what it leaves has to pay for them."""
        if stage.config.get("threshold") is not None:
            return []  # If it meets the budget, they do nothing.
        found, place = [], self.stages.index(stage)
        for number, other in enumerate(self.stages):
            if other.done or not other.rule.attention or (other is stage and stage.once):
                continue
            sites = [at for at in other.sites if order(at) > order(site) or (at == site and number > place)]
            if other.once:
                before = [
                    one.sites[-1] for one in self.stages[:number] if not one.done and not one.config.get("threshold")
                ]
                last = max(order(at) for at in [site, *before])
                sites = [at for at in sites if order(at) > last][:1] or sites[-1:]
            found += [(at, other) for at in sites]
        return found

    def reading(self, stage: Stage, n: int) -> int:
        """FLOPs of the queries by keys that a stage looks at among `n` tokens."""
        queries = queries_of(stage.config)
        rows = n if queries == "all" else 1 if queries == "last" else min(int(queries), n)
        return 2 * self.shape.heads * self.shape.head_dim * rows * n

    def ask(self, stage: Stage, site: Site, look: Look) -> Choice:
        """What `stage` does at `site`."""
        choice = stage.rule.decide(self, stage, site, look)
        later = self.stages[self.stages.index(stage) + 1 :]
        if choice.finished or stage.once or site == stage.sites[-1]:
            stage.done = True
            layer, kind = order(site)
            for other in later:
                other.free_from = (layer, kind + 1) if choice.consumed else (layer, kind)
        if choice.budget_met:
            for other in later:
                other.done = True
        return choice

    # Budget -----------------------------------------------------------------------------------------------------------

    def enter_attention(self, n: int, held: int, span: bool) -> None:
        """`n` tokens attend, the layer holds `held` of them."""
        self.attn.append(n)
        self.kv.append(held)
        self.pairs.append(self.pairs_of(n, held, span))

    @staticmethod
    def pairs_of(n: int, held: int, span: bool) -> int:
        """(query, key) pairs: all held keys for each query, or those that a block of queries has in its spans."""
        if held >= n or not span:
            return n * min(held, n)
        pairs = 0
        for first in range(0, n, SPAN_BLOCK):
            block = range(first, min(first + SPAN_BLOCK, n))
            keys = {key for query in block for key in range(max(0, query - held + 1), query + 1)}
            pairs += len(block) * len(keys)
        return pairs

    def flops(self, attn: list[int], ffn: list[int], pairs: list[int]) -> int:
        """Two per multiply-add, of all layers and one position of the LM head."""
        s = self.shape
        total = 2 * s.hidden * s.vocab
        for a, f, p in zip(attn, ffn, pairs, strict=True):
            projections = s.hidden * s.head_dim * (s.heads + s.kv_heads + s.kv_heads + s.heads)
            total += 2 * a * projections + 2 * 2 * p * s.heads * s.head_dim + 2 * f * 3 * s.hidden * s.ffn
        return total

    @property
    def unit(self) -> str:
        assert self.budget is not None
        return next(name for name in ("tokens", "flops", "kv_cache") if self.budget.get(name) is not None)

    @property
    def limit(self) -> Fraction:
        """The budget as a number of FLOPs, or of tokens summed over layers."""
        assert self.budget is not None
        amount, s = Fraction(repr(self.budget[self.unit])), self.shape
        if self.unit == "flops":
            dense = [self.total] * s.layers
            return amount * self.flops(dense, dense, [self.total**2] * s.layers) if amount <= 1 else amount
        if amount <= 1:
            return amount * s.layers * (self.vision if self.budget.get("of") == "vision" else self.total)
        return amount * s.layers if self.unit == "tokens" else amount / (2 * s.kv_heads * s.head_dim * s.bytes)

    def cost(self, attn: list[int], ffn: list[int], kv: list[int], pairs: list[int]) -> int:
        """What these counts of all layers cost in the unit of `limit`."""
        assert self.budget is not None
        if self.unit == "flops":
            return self.flops(attn, ffn, pairs) + self.selector
        return sum(kv) - (self.fixed * len(kv) if self.budget.get("of") == "vision" else 0)

    def project(self, n: int, changes: dict[Site, int], readers: list[tuple[Site, Stage]]) -> int:
        """The cost if the row has `n` tokens now, goes on with those of `changes` from each site on, and `readers` read."""
        attn, ffn, kv, pairs = list(self.attn), list(self.ffn), list(self.kv), list(self.pairs)
        for layer in range(len(ffn), self.shape.layers):
            n = min(n, changes.get((layer, "pre_attention"), n))
            if layer == len(attn):
                attn.append(n)
                kv.append(n)
                pairs.append(n * n)
            n = min(n, changes.get((layer, "pre_ffn"), n))
            ffn.append(n)
        return self.cost(attn, ffn, kv, pairs) + self.read(attn, readers)

    def read(self, attn: list[int], readers: list[tuple[Site, Stage]]) -> int:
        """FLOPs that a budget pays for what `readers` look at, with these counts in the attention of the layers."""
        if self.unit != "flops" or self.budget is None or self.budget["flops"] == 1:
            return 0
        looks = [(layer if kind == "pre_ffn" else layer - 1, stage) for (layer, kind), stage in readers]
        return sum(self.reading(stage, attn[layer]) for layer, stage in looks if stage.rule.attention)

    def room(self, stage: Stage, site: Site, look: Look, action: str) -> int:
        """How many reducible tokens may stay; at a kv site, how many tokens the layer may hold."""
        assert self.budget is not None
        n, reducible = len(look.tokens), len(look.reducible)
        if site[1] == "kv":
            return self._kv_room(stage, site, n, self.readers(stage, site))
        if self.budget.get("arithmetic") == "released":
            return self._released_room(reducible, action)
        later = [at for at in stage.sites if order(at) > order(site)] if stage.solved and not stage.once else []
        best, readers = 0, self.readers(stage, site)
        for keep in range(reducible + 1):
            changes, share = {site: self.fixed + keep}, Fraction(keep, reducible)
            for power, at in enumerate(later):
                changes[at] = self.fixed + max(
                    math.floor(keep * share ** (power + 1)), min(keep, 1)
                )  # One always stays.
            if self.project(n, changes, readers) <= self.limit:
                best = keep
        assert best > 0, "the budget leaves nothing: choose another one for the test"
        return best

    def _kv_room(self, stage: Stage, site: Site, n: int, readers: list[tuple[Site, Stage]]) -> int:
        span = stage.config["strategy"] == "streaming_window"
        layers = [at[0] for at in stage.sites]
        best = 0
        for held in range(n + 1):
            kv, pairs = list(self.kv), list(self.pairs)
            for layer in range(site[0], self.shape.layers):
                kv.append(held if layer in layers else n)
                pairs.append(self.pairs_of(n, held, span) if layer in layers else n * n)
            rest = [n] * (self.shape.layers - site[0])
            attn = self.attn + rest
            if self.cost(attn, self.ffn + rest, kv, pairs) + self.read(attn, readers) <= self.limit:
                best = held
        return best

    def _released_room(self, reducible: int, action: str) -> int:
        """Shares of vision tokens that are removed, in the released code's floating point."""
        alive, spent = 1.0, 0.0
        counts = [self.vision, *(held - self.fixed for held in self.attn)]
        for before, after in itertools.pairwise(counts):
            alive *= 1 - (before - after) / before
            spent += alive
        assert self.budget is not None
        left = self.shape.layers * float(self.budget[self.unit]) - spent
        capacity = (self.shape.layers - len(self.attn)) * alive
        removal = 0.0 if left >= capacity else 1 - left / capacity
        kept = {
            "prune": round((1 - removal) * reducible),
            "merge": reducible - math.floor(removal * reducible),
            "bound": reducible - math.ceil(removal * reducible),
        }
        return max(kept[action], 1)

    def count(self, stage: Stage, site: Site, look: Look, action: str = "prune") -> int:
        """How many reducible tokens stay, by the stage's `keep` or by the budget; there, at a kv site, see `room`."""
        keep = stage.config.get("keep")
        if isinstance(keep, (list, tuple)):
            keep = keep[stage.sites.index(site)]
        if keep is not None:
            count = max(math.floor(Fraction(repr(keep)) * self.vision), 1)
        else:
            count = self.room(stage, site, look, action)
            if site[1] == "kv":
                return count
        return min(count, len(look.reducible))

    # Choosing ---------------------------------------------------------------------------------------------------------

    def best(self, scores: dict[int, float], count: int) -> set[int]:
        """The `count` of highest score, the earlier one of equals; notes how close the choice was."""
        ranked = sorted(scores, key=lambda i: (-scores[i], i))
        if 0 < count < len(ranked):
            self.margin = min(self.margin, scores[ranked[count - 1]] - scores[ranked[count]])
        return set(ranked[:count])


def queries_of(config: dict[str, Any]) -> str | int:
    return {"cumulative": "all", "last": "last", "window": config["window"]}[config["importance"]]  # type: ignore[no-any-return]


Decide = Callable[[Plan, Stage, Site, Look], Choice]


@dataclass(frozen=True)
class Rule:
    """How a strategy decides, and where it acts by default."""

    decide: Decide
    kind: str = "pre_attention"
    attention: bool = False
    waits: bool = False


RULES: dict[str, Rule] = {}
"""By the name of the strategy; filled by `oracle_strategies`."""
