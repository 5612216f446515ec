"""What may remain, in any unit: the declaration of a budget. Paper: FrameFusion §5.1 (token budget).

`tokenreduce.planning.account` solves for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tokenreduce.errors import BudgetError, nearest

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
