"""InfiniPot-V: the cache holds keys that have changed since, and tokens whose values are large.

Paper: Kim et al., InfiniPot-V: Memory-Constrained KV Cache Compression for Streaming Video Understanding (NeurIPS 2025), §4.1 for
temporal-axis redundancy (TaR), §4.2 for value norms (VaN); a half each, and the newest quarter of the frames, in its public code.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from tokenreduce.amounts import Keep
from tokenreduce.ops.choose import directions
from tokenreduce.ops.frames import slot_table
from tokenreduce.reduction import Reduction
from tokenreduce.strategy import Capabilities, StageConfig, StageContext, Strategy


class InfiniPotV(Strategy):
    """Per KV head: the newest frames stay; of the older keys, those least like the same slot of the newest frames fill the share
    `tar` of the count; the rest goes to the largest value norms. Vision only, after each layer's attention.

    Counts below the newest frames keep the largest values among those (the public code raises). Its pooling of scores by layer is
    not offered.
    """

    name = "infinipot_v"
    capabilities = Capabilities(sites=("cache",), attention=True, chooses_count=True)

    class Config(StageConfig):
        """Fields of an infinipot_v stage."""

        strategy: Literal["infinipot_v"] = "infinipot_v"
        tar: float = Field(0.5, ge=0, le=1, description="Share of the count that newest frames and changed keys fill.")
        newest: float = Field(0.25, gt=0, le=1, description="Share of the frames that are the newest.")
        keep: Keep | None = Field(
            None, description="How many vision tokens each KV head holds; left out: from the budget."
        )

    config: Config

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        count = self.keep_count(ctx)
        scores = ctx.values.to(torch.promote_types(ctx.values.dtype, torch.float32)).norm(dim=-1)
        u, first = directions(ctx.keys), scores.amax() + 1
        media = ctx.groups("medium")
        shares = ctx.share(count, media, media.sizes)
        for medium, share in enumerate(shares):
            table = slot_table(ctx.frame, ctx.slot, media.mask(medium))
            newest = table[len(table) - int(len(table) * self.config.newest) :]
            recent = newest[newest >= 0]
            scores[:, recent] = scores[:, recent] + 2 * first
            older = table[: len(table) - len(newest)]
            changed = share - round((1 - self.config.tar) * share) - len(recent)
            if changed <= 0 or not len(older) or not len(newest):
                continue
            # The mean cosine to the newest frames of a slot is the product with the mean of their directions.
            centre = (u[:, newest.clamp(min=0)] * (newest >= 0)[..., None]).mean(1)
            likeness = (u[:, older.clamp(min=0)] * centre[:, None]).sum(-1)
            old = older[older >= 0]
            rank = (-likeness[:, older >= 0]).argsort(dim=1, descending=True, stable=True)[:, :changed]
            scores.scatter_add_(1, old[rank], first.expand(rank.shape))
        return ctx.keep_top(scores, count)
