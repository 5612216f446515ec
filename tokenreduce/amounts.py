"""How a stage's fields say how much and where: counts and shares of tokens, layers and shares of the depth.

A whole number of 2 or more is a count and 0 is none; 1, a number with a decimal point and a fraction such as "192/576" are
shares; one token is {tokens: 1}. A layer is a whole number, or a share of the depth, rounded down.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Share = Annotated[float, Field(gt=0, le=1)]
"""A share of the original vision tokens, and nothing else. `Keep` takes counts, too."""
NumberOfLayer = Annotated[int, Field(ge=0, strict=True)]
ShareOfDepth = Annotated[float, Field(gt=0, lt=1, strict=True)]
Layer = NumberOfLayer | ShareOfDepth
"""A layer: its number, or a share of the depth with a decimal point (0.25 of 30 layers is layer 7)."""


class Tokens(BaseModel):
    """A count of vision tokens, where a bare number would be a share, or of each medium."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(ge=0, strict=True, description="How many vision tokens stay.")
    per: Literal["medium"] | None = Field(
        None, description="`medium`: so many of each image or video; left out: of all together."
    )


def _fraction(text: str) -> str:
    above, below = map(int, text.split("/"))
    if not 0 < above <= below:
        raise ValueError(f"expected a fraction above 0 and at most 1, got {text}")
    return text


Keep = (
    Annotated[int, Field(ge=0, strict=True)]
    | Annotated[float, Field(gt=0, le=1, strict=True)]
    | Annotated[str, Field(pattern=r"^[0-9]{1,9}/[0-9]{1,9}$"), AfterValidator(_fraction)]
    | Tokens
)
"""How many vision tokens a stage keeps: 192 or {tokens: 1} is a count, 0 none; 0.25, "192/576" and 1 are shares."""


def count_in(keep: Keep) -> int | None:
    """The count that `keep` states, None where it is a share."""
    if isinstance(keep, Tokens):
        return keep.tokens
    return keep if isinstance(keep, int) and keep != 1 else None


def share_in(keep: Keep) -> Fraction | None:
    """The share that `keep` states, None where it is a count."""
    if count_in(keep) is not None:
        return None
    return Fraction(keep) if isinstance(keep, str) else Fraction(repr(keep))


def of_total(share: Fraction, total: int) -> int:
    """`share` of `total` tokens, rounded down. Where a float's last digits alone are missing to a whole number, it is that."""
    exact = share * total
    nearest = round(exact)
    return nearest if abs(exact - nearest) * 10**9 < 1 else int(exact)


def layer_of(layer: Layer, depth: int) -> int:
    """The number of `layer` in a decoder of `depth` layers."""
    return layer if isinstance(layer, int) else int(Fraction(repr(layer)) * depth)
