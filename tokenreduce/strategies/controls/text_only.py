"""Control: no vision token at all. The floor: what the words alone tell."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from tokenreduce.reduction import Reduction
from tokenreduce.strategy import Capabilities, CountView, Layer, Outcome, StageConfig, StageContext, Strategy


class TextOnly(Strategy):
    """Every vision token goes before layer `at`. Positions stay the originals."""

    name = "text_only"
    capabilities = Capabilities(sites=("pre_attention", "pre_ffn"))

    class Config(StageConfig):
        """Fields of a text_only stage."""

        strategy: Literal["text_only"] = "text_only"
        at: Layer = Field(0, description="Layer at which they go.")

    config: Config

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        return ctx.keep(torch.zeros_like(ctx.reducible))

    def forecast(self, view: CountView) -> Outcome:
        """None stays."""
        return Outcome(0)
