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
_FRACTION = re.compile(r"\s*([0-9]{1,9})\s*/\s*([0-9]{1,9})\s*")
_SUFFIXES = {"tokens": (), "flops": ("flop", "flops"), "kv_cache": ("b", "bytes")}
_DENOMINATOR = 10**6
"""A float that is the nearest one to a fraction with a denominator up to this stands for that fraction."""
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
        "all", description="Whether tokens count text too (FrameFusion's paper) or reducible vision tokens only."
    )
    per: Literal["sequence", "medium"] = Field(
        "sequence", description="`medium`: each image or video has the budget to itself, which needs `of: vision`."
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
        if not self.relative and self.arithmetic == "released":
            raise ValueError("`arithmetic: released` needs a budget that is a share in (0, 1]")
        if self.unit == "flops" and (self.of == "vision" or self.arithmetic == "released"):
            raise ValueError("`of: vision` and `arithmetic: released` go with tokens or kv_cache, not with flops")
        if self.arithmetic == "released" and self.of != "vision":
            raise ValueError("`arithmetic: released` counts vision tokens: add `of: vision`")
        if self.per == "medium" and self.of != "vision":
            raise ValueError("`per: medium` counts the vision tokens of each image or video: add `of: vision`")
        if self.per == "medium" and self.arithmetic == "released":
            raise ValueError("`per: medium` goes with `arithmetic: exact`: the released code has one budget for all")
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
        """A Budget from a Budget, a share in (0, 1] (of tokens), a mapping, or text. Raises BudgetError.

        Text is what a command line can say: a share, an amount whose unit tells what is meant (`512MiB`, `12.5TFLOPs`), or the
        fields of a mapping, such as `flops=0.25` and `tokens: 192, of: vision`.
        """
        if isinstance(value, Budget):
            return value
        if value is None:
            raise BudgetError(
                "budget: expected a share in (0, 1] such as 0.3, or a mapping such as {tokens: 0.3}, got None"
            )
        if isinstance(value, str) and not is_share(value):
            value = _read(value)
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
        whose = " of vision tokens" if self.of == "vision" else ""
        return f"{self.unit} {value}{whose}{' of each image or video' if self.per == 'medium' else ''}"


def is_share(value: Any) -> bool:
    """Whether `value` is a bare number, as a share is, and not an amount with its unit or a mapping."""
    if isinstance(value, str):
        found = _QUANTITY.fullmatch(value)
        return (found is not None and not (found[2] or found[3])) or _FRACTION.fullmatch(value) is not None
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read(text: str) -> Any:
    """The mapping that `text` stands for; `text` itself where it is none."""
    inside = text.strip().removeprefix("{").removesuffix("}")
    fields = [re.split(r"[:=]", part, maxsplit=1) for part in inside.split(",")]
    if all(len(field) == 2 for field in fields):
        read = {name.strip(): value.strip() for name, value in fields}
        if len(read) < len(fields):
            raise BudgetError(f"budget: {text!r:.80} says one field twice")
        return {name: _plain(value) for name, value in read.items()}
    found = _QUANTITY.fullmatch(text)
    suffix = (found[3] or "").lower() if found else ""
    unit = next((unit for unit, suffixes in _SUFFIXES.items() if suffix and suffix in suffixes), None)
    if unit is None and found:
        raise BudgetError(f"budget: {text!r:.80} of what? Write kv_cache={text.strip()} or flops={text.strip()}")
    return text if unit is None else {unit: text}


def _plain(text: str) -> int | float | str:
    """The number in `text`, if it is a bare one."""
    if text.isascii() and text.isdigit() and len(text) < 30:
        return int(text)
    return float(_number(text, "tokens")) if is_share(text) else text


def in_bytes(count: int) -> str:
    """`count` bytes for people, rounded up, as a budget may be written: `3.416MiB`."""
    return _scaled(count, [("MiB", 2**20), ("KiB", 2**10)], "B")


def in_flops(count: int) -> str:
    """`count` FLOPs for people, rounded up, as a budget may be written: `12.346GFLOPs`."""
    return _scaled(count, [("GFLOPs", 10**9), ("MFLOPs", 10**6), ("kFLOPs", 10**3)], "FLOPs")


def _scaled(count: int, scales: list[tuple[str, int]], unit: str) -> str:
    for name, scale in scales:
        if 10 * count >= scale:
            return f"{math.ceil(Fraction(1000 * count, scale)) / 1000:.15g}{name}"
    return f"{count}{unit}"


def _number(value: Any, unit: str) -> Fraction:
    """The positive amount `value` stands for; BudgetError where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise BudgetError(f"budget {unit}: expected a number, got {value!r:.80}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BudgetError(f"budget {unit}: expected a finite number above 0, got {value}")
    fraction = _FRACTION.fullmatch(value) if isinstance(value, str) else None
    if fraction is not None and int(fraction[2]):
        number = Fraction(int(fraction[1]), int(fraction[2]))
    elif isinstance(value, str):
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
        number = Fraction(value) if isinstance(value, int) else _meant(float(value))
    if number <= 0:
        raise BudgetError(f"budget {unit}: expected a number above 0, got {value!s:.80}")
    return number


def _meant(value: float) -> Fraction:
    """The fraction that was written: 1/3 for 192/576, 3/10 for 0.3, not their binary neighbours."""
    near = Fraction(value).limit_denominator(_DENOMINATOR)
    return near if float(near) == value else Fraction(repr(value))
