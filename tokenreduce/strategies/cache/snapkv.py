"""SnapKV: the last queries of the prompt say which keys and values the cache holds.

Paper: Li et al., SnapKV: LLM Knows What You are Looking for Before Generation (NeurIPS 2024), §4, as kvpress has it: mean over
the window and over the queries of a KV head. Window 32 and kernel 5 of the public code.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from tokenreduce.amounts import Keep
from tokenreduce.reduction import Reduction
from tokenreduce.strategy import Capabilities, CountView, Outcome, StageConfig, StageContext, Strategy


class SnapConfig(StageConfig):
    """Fields of every stage that scores keys by a window of queries."""

    window: int = Field(32, ge=1, description="Last queries, which score and whose own keys stay.")
    kernel: int = Field(5, ge=1, description="Width of the average over neighbouring keys, odd.")

    @field_validator("kernel")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("`kernel` must be odd: an even one gives a score more than there are keys")
        return value


class SnapKV(Strategy):
    """After each layer's attention, each KV head holds the window and the keys that it attends to most, averaged over neighbours.

    Text goes like vision. Fewer than a window are its last ones (kvpress keeps an arbitrary part of it). Scores are padded with
    zeros at both ends, as published, so the first two and the last two keys before the window are lowered.
    """

    name = "snapkv"
    capabilities = Capabilities(sites=("cache",), attention=True, chooses_count=True, text=True)

    class Config(SnapConfig):
        """Fields of a snapkv stage."""

        strategy: Literal["snapkv"] = "snapkv"
        keep: Keep | None = Field(
            None, description="How many tokens each KV head holds; left out: solved from the budget."
        )

    config: SnapConfig

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        return ctx.keep_top(window_scores(ctx, self.config.window, self.config.kernel), self.keep_count(ctx))

    def forecast(self, view: CountView) -> Outcome:
        """The count, after the window's attention has been paid for."""
        view.attention(self.config.window)
        return super().forecast(view)


def window_scores(ctx: StageContext, window: int, kernel: int) -> Tensor:
    """(G, n): mean attention of the last `window` queries, averaged over `kernel` keys; the window itself ranks first, last ones
    most."""
    window = min(window, ctx.n)
    heads = ctx.attention(window, heads="each")[:, : ctx.n - window] / window
    pooled = (
        nn.functional.avg_pool1d(heads[None], kernel, padding=kernel // 2, stride=1)[0] if heads.shape[1] else heads
    )
    scores = per_kv_head(pooled, len(ctx.keys))
    top = scores.amax() + 1 if scores.numel() else scores.new_ones(())
    order = torch.arange(1, window + 1, device=scores.device).to(scores.dtype) / window
    return torch.cat([scores, (top + order).expand(len(scores), -1)], 1)


def per_kv_head(heads: Tensor, groups: int) -> Tensor:
    """(G, n): mean over the query heads (H, n) of each KV head."""
    return heads.view(groups, -1, heads.shape[-1]).mean(1)
