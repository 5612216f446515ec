"""Keep the vision tokens whose hidden state is longest. Costs next to nothing; no attention is read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tokenreduce.plugin import Capabilities, Layer, Reduction, Share, StageConfig, StageContext, Strategy


class KeepLargestNorm(Strategy):
    """Keep the vision tokens of largest norm, as many as `keep` or the budget says."""

    name = "keep_largest_norm"
    capabilities = Capabilities(sites=("pre_attention", "pre_ffn"), chooses_count=True)

    class Config(StageConfig):
        """Fields of a keep_largest_norm stage."""

        strategy: Literal["keep_largest_norm"] = "keep_largest_norm"
        at: Layer | list[Layer] = Field(2, description="Layer or layers at which the stage acts.")
        order: Literal[1, 2] = Field(2, description="Norm: 1 sums absolute values, 2 is Euclidean.")
        keep: Share | list[Share] | None = Field(
            None, description="Share of the original vision tokens that remains; left out: solved from the budget."
        )

    config: Config

    def decide(self, ctx: StageContext) -> Reduction:
        """Rank by norm. In float32, so that half precision does not make ties."""
        norms = ctx.hidden.float().norm(p=self.config.order, dim=-1)
        return ctx.keep_top(norms, self.keep_count(ctx))
