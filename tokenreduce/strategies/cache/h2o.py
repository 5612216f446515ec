"""H2O: the cache holds the tokens that have received most attention, and the latest.

Paper: Zhang et al., H2O: Heavy-Hitter Oracle (NeurIPS 2023), §4; as many recent as heavy tokens in its public code.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from tokenreduce.amounts import Keep
from tokenreduce.reduction import Reduction
from tokenreduce.strategies.cache.snapkv import per_kv_head
from tokenreduce.strategy import Capabilities, CountView, Outcome, StageConfig, StageContext, Strategy


class H2O(Strategy):
    """After each layer's attention in the prefill, each KV head holds a share of recent tokens, and of the others those of
    highest accumulated attention. Text goes like vision; what decoding adds stays.

    `normalise` divides by the number of queries that can see a key, as kvpress's ObservedAttention does, which has no recent
    part.
    """

    name = "h2o"
    capabilities = Capabilities(sites=("cache",), attention=True, chooses_count=True, text=True)

    class Config(StageConfig):
        """Fields of an h2o stage."""

        strategy: Literal["h2o"] = "h2o"
        recent: float = Field(0.5, ge=0, le=1, description="Share of the held tokens that are the latest.")
        normalise: bool = Field(False, description="Divide by the number of queries that can see a key.")
        keep: Keep | None = Field(
            None, description="How many tokens each KV head holds; left out: solved from the budget."
        )

    config: Config

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        scores, count = per_kv_head(ctx.attention("all", heads="each"), len(ctx.keys)), self.keep_count(ctx)
        place = torch.arange(ctx.n, device=scores.device)
        if self.config.normalise:
            scores = scores / (ctx.n - place)
        latest = place >= ctx.n - int(count * self.config.recent)
        return ctx.keep_top(torch.where(latest, torch.inf, scores), count)

    def forecast(self, view: CountView) -> Outcome:
        """The count, after all rows of attention have been paid for."""
        view.attention("all")
        return super().forecast(view)
