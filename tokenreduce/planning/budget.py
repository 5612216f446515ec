"""What may remain, in any unit, and how many tokens each coming layer may therefore hold.

`Budget` is the declaration; `Account` is one sequence's running account of it. Everything is integer or rational
arithmetic on token counts: no tensor, no rounding surprises. Paper: FrameFusion §5.1 (token budget) and §9, Eq. 4.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tokenreduce.errors import BudgetError, nearest
from tokenreduce.planning.cost import DecoderShape, prefill_flops
from tokenreduce.strategy import SITE_ORDER, Site

SPAN_BLOCK = 128
"""Queries per block of an attention over a span."""

_SCALES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_QUANTITY = re.compile(
    r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?(?:e[0-9]{1,2})?)\s*([kmgtp]?i?)(b|bytes|flops?)?\s*", re.IGNORECASE
)
_SUFFIXES = {"tokens": (), "flops": ("flop", "flops"), "kv_cache": ("b", "bytes")}
_EXAMPLES = {"tokens": "", "flops": " or an amount such as 12.5T", "kv_cache": " or an amount such as 512MiB"}


class Budget(BaseModel):
    """What remains, never what is removed. Exactly one of `tokens`, `flops`, `kv_cache`.

    A number in (0, 1] is relative to the dense prefill of the same input; anything else is absolute, per sequence.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: float | int | None = Field(
        None, description="Mean over layers of the tokens held: a share in (0, 1] of the input, or a number of tokens."
    )
    flops: float | int | str | None = Field(
        None, description="FLOPs of the decoder's prefill: a share in (0, 1], or an amount such as `12.5T`."
    )
    kv_cache: float | int | str | None = Field(
        None, description="KV cache after the prefill: a share in (0, 1], or an amount such as `512MiB`."
    )
    of: Literal["all", "vision"] = Field(
        "all", description="Whether a share of tokens counts text too (the paper) or reducible vision tokens only."
    )
    arithmetic: Literal["exact", "released"] = Field(
        "exact",
        description="`exact` never exceeds the budget; `released` rounds as the released FrameFusion code does.",
    )

    @field_validator("tokens", "flops", "kv_cache", mode="before")
    @classmethod
    def _no_bool(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(f"expected a number, got {value}")
        return value

    @model_validator(mode="after")
    def _check(self) -> Budget:
        given = [unit for unit in ("tokens", "flops", "kv_cache") if getattr(self, unit) is not None]
        if len(given) != 1:
            raise ValueError(f"a budget has exactly one of tokens, flops, kv_cache; got {', '.join(given) or 'none'}")
        amount = self.amount
        if self.unit == "tokens" and amount > 1 and amount.denominator != 1:
            raise ValueError(f"a token budget is a share in (0, 1] or a whole number of tokens, got {float(amount):g}")
        if not self.relative and (self.of == "vision" or self.arithmetic == "released"):
            raise ValueError("`of: vision` and `arithmetic: released` need a budget that is a share in (0, 1]")
        if self.unit == "flops" and (self.of == "vision" or self.arithmetic == "released"):
            raise ValueError("`of: vision` and `arithmetic: released` go with tokens or kv_cache, not with flops")
        if self.arithmetic == "released" and self.of != "vision":
            raise ValueError("`arithmetic: released` counts vision tokens: add `of: vision`")
        return self

    @property
    def unit(self) -> Literal["tokens", "flops", "kv_cache"]:
        """The unit the budget is given in."""
        if self.tokens is not None:
            return "tokens"
        return "flops" if self.flops is not None else "kv_cache"

    @property
    def amount(self) -> Fraction:
        """The number as it was written: 0.3 is 3/10, not its binary neighbour."""
        return _number(getattr(self, self.unit), self.unit)

    @property
    def relative(self) -> bool:
        """Whether the amount is a share of the dense prefill."""
        return self.amount <= 1

    @classmethod
    def parse(cls, value: Any) -> Budget:
        """A Budget from a Budget, a share in (0, 1] (of tokens), or a mapping. Raises BudgetError."""
        if isinstance(value, Budget):
            return value
        if value is None:
            raise BudgetError(
                "budget: expected a share in (0, 1] such as 0.3, or a mapping such as {tokens: 0.3}, got None"
            )
        if isinstance(value, Mapping):
            unknown = [key for key in value if key not in cls.model_fields]
            if unknown:
                raise BudgetError(f"budget: unknown field {unknown[0]!r}{nearest(str(unknown[0]), cls.model_fields)}")
        else:
            share = _number(value, "tokens")
            if share > 1:
                raise BudgetError(
                    f"budget {value} is above 1: a bare budget is the share that remains, in (0, 1]; "
                    "write {tokens: N} for a number of tokens"
                )
            value = {"tokens": float(share)}
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = f" {first['loc'][0]}" if first["loc"] else ""
            raise BudgetError(f"budget{where}: {first['msg'].removeprefix('Value error, ')}") from None

    def __str__(self) -> str:
        value = getattr(self, self.unit)
        return f"{self.unit} {value}{' of vision tokens' if self.of == 'vision' else ''}"


def _number(value: Any, unit: str) -> Fraction:
    """The positive amount `value` stands for; BudgetError where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise BudgetError(f"budget {unit}: expected a number, got {value!r:.80}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BudgetError(f"budget {unit}: expected a finite number above 0, got {value}")
    if isinstance(value, str):
        match = _QUANTITY.fullmatch(value)
        scale = (_BINARY | _SCALES).get(match[2].lower()) if match else None
        suffix = (match[3] or "").lower() if match else ""
        if match is None or scale is None or (suffix and suffix not in _SUFFIXES[unit]):
            raise BudgetError(
                f"budget {unit}: cannot read {value!r:.80}; write a share such as 0.3{_EXAMPLES[unit]}, above 0"
            )
        number = Fraction(match[1]) * scale
        if 0 < number <= 1 and (match[2] or suffix):
            raise BudgetError(f"budget {unit}: {value!r} is next to nothing; a share is written without a unit")
    else:
        number = Fraction(value if isinstance(value, int) else repr(float(value)))
    if number <= 0:
        raise BudgetError(f"budget {unit}: expected a number above 0, got {value!s:.80}")
    return number


Change = tuple[Site, int]
"""From this site on, so many tokens at the most."""
Reading = Callable[[Sequence[int]], int]
"""FLOPs that are still to be spent on importance, where so many tokens enter the attention of each layer."""


@dataclass
class Account:
    """What one sequence has spent of its budget, layer by layer, and what it can still afford.

    Args:
        budget: the declaration. shape: the decoder. total: tokens of the sequence. reducible: those a stage may touch.
        cache_bytes: bytes of one KV cache element.
        attn, ffn, kv: tokens that went through the attention and the FFN of each layer so far, and that its cache holds.
        pairs: (query, key) pairs of each layer's attention; None for a full square.
        selector_flops: FLOPs spent on computing importance.
    """

    budget: Budget | None
    shape: DecoderShape
    total: int
    reducible: int
    cache_bytes: int = 2
    attn: list[int] = field(default_factory=list)
    ffn: list[int] = field(default_factory=list)
    kv: list[int] = field(default_factory=list)
    pairs: list[int | None] = field(default_factory=list)
    selector_flops: int = 0

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

    def project(self, now: int, changes: Sequence[Change], reading: Reading | None = None) -> int:
        """Cost of the whole forward if the sequence, with `now` tokens, goes on through `changes`."""
        attn, ffn, kv, pairs = list(self.attn), list(self.ffn), list(self.kv), list(self.pairs)
        pending: dict[int, int] = {}
        for site, most in changes:
            pending[site.order] = min(most, pending.get(site.order, most))
        count = now
        for layer in range(min(len(attn), len(ffn)), self.shape.layers):
            for step, kind in enumerate(SITE_ORDER):
                count = min(count, pending.get(3 * layer + step, count))
                if kind == "kv" and layer >= len(attn):
                    attn.append(count)
                    kv.append(count)
                    pairs.append(None)
                if kind == "pre_ffn" and layer >= len(ffn):
                    ffn.append(count)
        return self.cost(attn, ffn, kv, pairs) + (reading(attn) if reading is not None and self.reads else 0)

    def affordable(self, now: int, changes: Sequence[Change], reading: Reading | None = None) -> bool:
        """Whether that meets the budget."""
        return self.project(now, changes, reading) <= self.limit

    @property
    def reads(self) -> bool:
        """Whether the budget has to pay for importance; a share of 1 keeps everything all the same."""
        return self.budget is not None and self.budget.unit == "flops" and self.budget.amount != 1

    def allowance(self, site: Site, reducible: int, later: Sequence[Site] = (), reading: Reading | None = None) -> int:
        """The most reducible tokens that may stay from `site` on; −1 if not even none does.

        reducible: how many there are now. later: sites at which the same stage will act again; it is taken to keep the same
        share at each of them (PyramidDrop's schedule).
        """

        def fits(keep: int) -> bool:
            return self.affordable(self.fixed + reducible, list(self._falling(site, later, keep, reducible)), reading)

        if not fits(0):
            return -1
        low, high = 0, reducible
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def _falling(self, site: Site, later: Sequence[Site], keep: int, reducible: int) -> Iterator[Change]:
        share = Fraction(keep, max(reducible, 1))
        for power, at in enumerate((site, *later)):
            # One token always stays: planning for none would leave the last site less than it must keep.
            yield at, self.fixed + max(int(keep * share**power), min(keep, 1))

    def kv_allowance(
        self, layer: int, scheduled: Sequence[int], tokens: int, span: bool, reading: Reading | None = None
    ) -> int:
        """The most tokens that the KV cache of `layer` and of each later layer in `scheduled` may hold; −1 if none.

        tokens: tokens alive. span: whether queries see a moving span instead of all held keys, see `kv_pairs`.
        """

        def fits(held: int) -> bool:
            return self.project_kv(layer, scheduled, tokens, held, span, reading) <= self.limit

        if not fits(0):
            return -1
        low, high = 0, tokens
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def project_kv(
        self, layer: int, scheduled: Sequence[int], tokens: int, held: int, span: bool, reading: Reading | None = None
    ) -> int:
        """Cost of the whole forward if the caches of `layer` and of the later ones in `scheduled` hold `held` tokens."""
        attn, ffn, kv, pairs = list(self.attn), list(self.ffn), list(self.kv), list(self.pairs)
        for at in range(layer, self.shape.layers):
            reduced = at in scheduled and held < tokens
            attn.append(tokens)
            ffn.append(tokens)
            kv.append(held if reduced else tokens)
            pairs.append(kv_pairs(tokens, held, span) if reduced else None)
        return self.cost(attn, ffn, kv, pairs) + (reading(attn) if reading is not None and self.reads else 0)

    def share(self, cost: int) -> float:
        """`cost` as a share of the dense prefill, rounded up to four places: what to ask for so that it fits."""
        assert self.budget is not None
        dense = [self.total] * self.shape.layers
        whole = self.cost(dense, dense, dense, [None] * len(dense)) - (self.selector_flops if self.reads else 0)
        return math.ceil(Fraction(10**4 * cost, max(whole, 1))) / 10**4

    def refusal(self, least: int, reason: str = "", met: str = "met") -> BudgetError:
        """The error for a budget that even `least`, the cost of the smallest allowed choice, exceeds.

        reason: why, where it is not that the stages act too late. met: what it cannot be; a merge may still find enough."""
        assert self.budget is not None
        if self.budget.relative:
            smallest = f"{min(self.share(least), 1):g}"
        elif self.budget.unit == "tokens":
            smallest = f"{-(-least // self.shape.layers)} tokens"
        elif self.budget.unit == "flops":
            smallest = f"{least} FLOPs"
        else:
            smallest = f"{least * self.shape.cached * self.cache_bytes} bytes"
        why = reason or (f"{self.fixed} of {self.total} tokens always stay and the stages act too late to save more")
        return BudgetError(
            f"budget {self.budget} cannot be {met}: {why}; the smallest feasible budget here is {smallest}"
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
