"""What methods that act on the decoder's input have in common."""

from __future__ import annotations

from pydantic import Field

from tokenreduce.amounts import Keep, Layer
from tokenreduce.strategy import StageConfig


class InputConfig(StageConfig):
    """Fields of a stage that acts once, by default before layer 0."""

    at: Layer = Field(0, description="Layer before which the stage acts; 0 is the decoder's input.")
    keep: Keep | None = Field(None, description="How many vision tokens remain; left out: solved from the budget.")
