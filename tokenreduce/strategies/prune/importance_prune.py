"""FrameFusion's pruning stage: the tokens that attention looks at least are dropped.

Paper: Fu et al., FrameFusion (2025), §3.1 (importance) and §4.1 (stage).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tokenreduce.reduction import Reduction
from tokenreduce.strategy import (
    Capabilities,
    CountView,
    Heads,
    Keep,
    Outcome,
    Queries,
    StageConfig,
    StageContext,
    Strategy,
)

Importance = Literal["cumulative", "last", "window"]


class ImportanceConfig(StageConfig):
    """Fields of every stage that ranks tokens by the attention they receive."""

    importance: Importance = Field(
        "cumulative",
        description="Attention received from all queries (the paper), the last one (the released code), or the last `window`.",
    )
    window: int = Field(32, ge=1, description="Queries that count where importance is `window` (32 as in SnapKV).")
    heads: Heads = Field("mean", description="Mean or maximum over attention heads.")
    keep: Keep | list[Keep] | None = Field(
        None,
        description="Share of the original vision tokens that remains, or their number; left out: solved from the budget.",
    )

    @property
    def queries(self) -> Queries:
        """The rows to ask for."""
        if self.importance == "window":
            return self.window
        return "all" if self.importance == "cumulative" else "last"


class ImportancePrune(Strategy):
    """Keep the vision tokens of highest importance, as many as the budget leaves.

    Without `at` it waits for the stages before it and then acts once, before the FFN, on the attention of that layer.
    """

    name = "importance_prune"
    capabilities = Capabilities(sites=("pre_ffn", "pre_attention"), attention=True, chooses_count=True, waits=True)

    class Config(ImportanceConfig):
        """Fields of an importance_prune stage."""

        strategy: Literal["importance_prune"] = "importance_prune"

    config: ImportanceConfig

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        scores = ctx.attention(self.config.queries, self.config.heads)
        return ctx.keep_top(scores, self.keep_count(ctx))

    def forecast(self, view: CountView) -> Outcome:
        """The allowance, after the reading of attention has been paid for."""
        view.attention(self.config.queries)
        return super().forecast(view)
