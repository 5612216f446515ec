"""How many tokens each coming layer may hold under a budget.

`Account` is one sequence's running account of its `Budget`. Everything is integer or rational arithmetic on token counts:
no tensor, no rounding surprises. Paper: FrameFusion §5.1 (token budget) and §9, Eq. 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from tokenreduce.budget import Budget, in_bytes, in_flops
from tokenreduce.errors import BudgetError
from tokenreduce.planning.cost import DecoderShape, prefill_flops
from tokenreduce.strategy import Contents, Site

SPAN_BLOCK = 128
"""Queries per block of an attention over a span."""

Change = tuple[Site, int]
"""From this site on, so many tokens at the most."""
ImportanceCost = Callable[[Sequence[int]], int]
"""FLOPs that are still to be spent on importance, where so many tokens enter the attention of each layer."""


@dataclass
class Account:
    """What one sequence has spent of its budget, layer by layer, and what it can still afford."""

    budget: Budget | None
    """The declaration; None where there is nothing to meet."""
    shape: DecoderShape
    """Of the decoder."""
    total: int
    """Tokens of the sequence."""
    reducible: int
    """Tokens that a stage may touch."""
    cache_bytes: int = 2
    """Bytes of one element of the KV cache."""
    attn: list[int] = field(default_factory=list)
    """Tokens that went through the attention of each layer so far."""
    ffn: list[int] = field(default_factory=list)
    """Tokens that went through the FFN of each layer so far."""
    kv: list[int] = field(default_factory=list)
    """Tokens that the cache of each layer so far holds."""
    pairs: list[int | None] = field(default_factory=list)
    """(query, key) pairs of the attention of each layer so far; None for a full square."""
    selector_flops: int = 0
    """FLOPs spent on computing importance."""
    contents: Contents | None = None
    """How the reducible tokens lie in frames; None where that is not known."""
    lenient: bool = False
    """A budget that cannot be met is no error: the stages go as low as they can (`on_infeasible: least`)."""
    pipeline: str = ""
    """Name of the pipeline, for refusals; "" where the caller adds it."""
    whose: str = ""
    """Of which image or video the account is, in words that end with a space; "" for the sequence's."""

    def afresh(self) -> Account:
        """The account of the same sequence before anything ran."""
        return replace(self, attn=[], ffn=[], kv=[], pairs=[], selector_flops=0)

    def copy(self) -> Account:
        """The account as it stands, to try something out on."""
        return replace(self, attn=[*self.attn], ffn=[*self.ffn], kv=[*self.kv], pairs=[*self.pairs])

    @property
    def spent(self) -> int:
        """Cost of the forward, in the coin of `limit`, once all layers have run."""
        return self.cost(self.attn, self.ffn, self.kv, self.pairs)

    @property
    def shortfall(self) -> str:
        """What a lenient account has to say once all layers have run and the budget was not met; "" where it was."""
        if not (self.lenient and self.budget and self.reducible and self.spent > self.limit):
            return ""
        return f"the budget ({self.budget}) {self.whose}cannot be met; this is as low as the stages go: {self.amount(self.spent)}"

    @property
    def fixed(self) -> int:
        """Tokens that always stay."""
        return self.total - self.reducible

    @property
    def limit(self) -> Fraction:
        """The budget in the unit's own coin: token·layers, or FLOPs."""
        assert self.budget is not None
        amount, layers = self.budget.amount, self.shape.layers
        if self.budget.unit == "flops":
            dense = [self.total] * layers
            return amount * prefill_flops(self.shape, dense, dense) if self.budget.relative else amount
        if self.budget.relative:
            return amount * layers * (self.reducible if self.budget.of == "vision" else self.total)
        if self.budget.unit == "tokens":
            return amount * layers
        return amount / (self.shape.cached * self.cache_bytes)

    def cost(self, attn: Sequence[int], ffn: Sequence[int], kv: Sequence[int], pairs: Sequence[int | None]) -> int:
        """What token counts for all layers would come to, in the coin of `limit`."""
        assert self.budget is not None
        if self.budget.unit == "flops":
            return prefill_flops(self.shape, attn, ffn, pairs=pairs) + (self.selector_flops if self.reads else 0)
        return sum(kv) - (self.fixed * len(kv) if self.budget.of == "vision" else 0)

    def project(self, now: int, changes: Sequence[Change], reading: ImportanceCost | None = None) -> int:
        """Cost of the whole forward if the sequence, with `now` tokens, goes on through `changes`."""
        attn, ffn, kv, pairs = list(self.attn), list(self.ffn), list(self.kv), list(self.pairs)
        pending: dict[int, int] = {}
        for site, most in changes:
            pending[site.order] = min(most, pending.get(site.order, most))
        count = now
        for layer in range(min(len(attn), len(ffn)), self.shape.layers):
            for step, kind in enumerate(("pre_attention", "kv", "pre_ffn")):
                count = min(count, pending.get(3 * layer + step, count))
                if kind == "kv" and layer >= len(attn):
                    attn.append(count)
                    kv.append(count)
                    pairs.append(None)
                if kind == "pre_ffn" and layer >= len(ffn):
                    ffn.append(count)
        return self.cost(attn, ffn, kv, pairs) + (reading(attn) if reading is not None and self.reads else 0)

    def affordable(self, now: int, changes: Sequence[Change], reading: ImportanceCost | None = None) -> bool:
        """Whether that meets the budget."""
        return self.project(now, changes, reading) <= self.limit

    @property
    def reads(self) -> bool:
        """Whether the budget has to pay for importance; a share of 1 keeps everything all the same."""
        return self.budget is not None and self.budget.unit == "flops" and self.budget.amount != 1

    def allowance(
        self,
        site: Site,
        reducible: int,
        later: Sequence[Site] = (),
        reading: ImportanceCost | None = None,
        least: int = 1,
    ) -> int:
        """The most reducible tokens that may stay from `site` on; −1 if not even none does.

        reducible: how many there are now. later: sites at which the same stage will act again; it is taken to keep the same
        share at each of them (PyramidDrop's schedule), and never fewer than `least`.
        """

        def fits(keep: int) -> bool:
            changes = list(self._falling(site, later, keep, reducible, least))
            return self.affordable(self.fixed + reducible, changes, reading)

        if not fits(0):
            return -1
        low, high = 0, reducible
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def _falling(self, site: Site, later: Sequence[Site], keep: int, reducible: int, least: int) -> Iterator[Change]:
        share = Fraction(keep, max(reducible, 1))
        for power, at in enumerate((site, *later)):
            # `least` always stays: planning for fewer would leave the last site less than it must keep.
            yield at, self.fixed + max(int(keep * share**power), min(keep, least))

    def kv_allowance(
        self,
        layer: int,
        scheduled: Sequence[int],
        tokens: int,
        span: bool,
        reading: ImportanceCost | None = None,
        after: bool = False,
    ) -> int:
        """The most tokens that the KV cache of `layer` and of each later layer in `scheduled` may hold; −1 if none.

        tokens: tokens alive. span: whether queries see a moving span instead of all held keys, see `kv_pairs`. after: whether the
        others go after the layer's attention, so that it compares all.
        """

        def fits(held: int) -> bool:
            return self.project_kv(layer, scheduled, tokens, held, span, reading, after) <= self.limit

        if not fits(0):
            return -1
        low, high = 0, tokens
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def project_kv(
        self,
        layer: int,
        scheduled: Sequence[int],
        tokens: int,
        held: int,
        span: bool,
        reading: ImportanceCost | None = None,
        after: bool = False,
    ) -> int:
        """Cost of the whole forward if the caches of `layer` and of the later ones in `scheduled` hold `held` tokens."""
        attn, ffn, kv, pairs = self.attn[:layer], self.ffn[:layer], self.kv[:layer], self.pairs[:layer]
        for at in range(layer, self.shape.layers):
            reduced = at in scheduled and held < tokens
            attn.append(tokens)
            ffn.append(tokens)
            kv.append(held if reduced else tokens)
            pairs.append(kv_pairs(tokens, held, span) if reduced and not after else None)
        return self.cost(attn, ffn, kv, pairs) + (reading(attn) if reading is not None and self.reads else 0)

    def share(self, cost: int) -> float:
        """`cost` as a share of the dense prefill, rounded up to four places: what to ask for so that it fits."""
        assert self.budget is not None
        dense = [self.total] * self.shape.layers
        whole = self.cost(dense, dense, dense, [None] * len(dense)) - (self.selector_flops if self.reads else 0)
        return math.ceil(Fraction(10**4 * cost, max(whole, 1))) / 10**4

    def amount(self, cost: int) -> str:
        """`cost` as a budget of the same unit may ask for it, rounded up."""
        assert self.budget is not None
        if self.budget.relative:
            return f"{min(self.share(cost), 1):g}"
        if self.budget.unit == "tokens":
            return f"{-(-cost // self.shape.layers)} tokens"
        return in_flops(cost) if self.budget.unit == "flops" else in_bytes(cost * self.shape.cached * self.cache_bytes)

    def refusal(self, least: int, reason: str) -> BudgetError:
        """The error for a budget that cannot be met. least: the smallest cost that can be had. reason: why not less."""
        whose = f"pipeline {self.pipeline}: " if self.pipeline else ""
        return BudgetError(
            f"{whose}budget {self.budget} {self.whose}cannot be met: {reason}; the smallest feasible budget here is "
            f"{self.amount(least)}"
        )


def kv_pairs(tokens: int, held: int, span: bool) -> int:
    """(query, key) pairs at a layer whose cache holds `held` of `tokens` tokens.

    span: each query sees a moving span of `held` tokens, and a block of SPAN_BLOCK queries computes the union of theirs;
    otherwise every query is compared with every held key.
    """
    if not span:
        return tokens * held
    whole, rest = divmod(tokens, SPAN_BLOCK)
    start = min(whole, -(-held // SPAN_BLOCK))  # Blocks whose first query sees everything before it.
    pairs = SPAN_BLOCK**2 * start * (start + 1) // 2 + (whole - start) * SPAN_BLOCK * (SPAN_BLOCK - 1 + held)
    return pairs + rest * (tokens - max(0, tokens - rest - held + 1))


def released_removal(shares: Sequence[float], cost: float, layers: int) -> float:
    """Share of the present vision tokens that the released FrameFusion code removes next, its own order of floating point.

    Args:
        shares: share of the vision tokens removed at each call so far. cost: the budget. layers: the decoder's depth, which
        the released code fixes at 28. Raises BudgetError where that code raises "The cost is too small".
    """
    alive, spent = 1.0, 0.0
    for share in shares:
        alive *= 1 - share
        spent += alive
    left = layers * cost - spent
    if left < 0:
        raise BudgetError(f"budget {cost}: the layers already run hold more than it allows")
    capacity = (layers - len(shares)) * alive
    return 0.0 if left >= capacity else 1 - left / capacity
