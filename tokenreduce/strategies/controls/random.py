"""Control: vision tokens at random. What a method must beat to have chosen anything."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tokenreduce.reduction import Reduction
from tokenreduce.strategy import Capabilities, Keep, Layer, StageConfig, StageContext, Strategy


class RandomPrune(Strategy):
    """Keep a random subset of the vision tokens, the same for the same seed and length."""

    name = "random"
    capabilities = Capabilities(sites=("pre_attention", "pre_ffn"), chooses_count=True)

    class Config(StageConfig):
        """Fields of a random stage."""

        strategy: Literal["random"] = "random"
        at: Layer | list[Layer] = Field(0, description="Layer or layers at which the stage acts.")
        seed: int = Field(0, ge=0, description="Seed of the choice.")
        keep: Keep | list[Keep] | None = Field(
            None,
            description="Share of the original vision tokens that remains, or their number; left out: solved from the budget.",
        )

    config: Config

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        return ctx.keep_top(ctx.random(self.config.seed + ctx.site.order), self.keep_count(ctx))
