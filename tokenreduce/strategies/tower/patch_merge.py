"""ToMe: similar patches of a frame are merged inside the vision tower.

Paper: Bolya et al., Token Merging: Your ViT But Faster (2023, arXiv 2210.09461), §3.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from tokenreduce.ops.bipartite import bipartite_target
from tokenreduce.reduction import Reduction
from tokenreduce.strategy import Capabilities, Share
from tokenreduce.vision import BlockStageConfig, VisionContext, VisionStrategy

ROUND = 4
"""A round merges at most one patch in so many: in a round of half of them, a patch unlike all others would have to go."""


class PatchMerge(VisionStrategy):
    """Before block `at`, merge the most similar patches of each frame until `keep` of them are left, as many in every frame.

    Bipartite soft matching, in rounds of at most a quarter; a merged token is the mean of its patches. Two things are not as
    published: the metric is the residual stream before the block, where ToMe takes the keys inside it, and few blocks merge much
    (in rounds) where ToMe merges a little in every block. Class tokens stay.
    """

    name = "patch_merge"
    capabilities = Capabilities(sites=("vision.block",), merges=True)

    class Config(BlockStageConfig):
        """Fields of a patch_merge stage."""

        strategy: Literal["patch_merge"] = "patch_merge"
        keep: Share | list[Share] = Field(
            description="Share of a frame's patches that is left; with a list in `at`, a falling share for each."
        )
        proportional: bool = Field(
            False,
            description="Proportional attention (ToMe, Eq. 1): a merged token is attended to as often as its patches.",
        )

        @model_validator(mode="after")
        def _shares(self) -> PatchMerge.Config:
            blocks = 1 if isinstance(self.at, int) else len(self.at)
            shares = [self.keep] if isinstance(self.keep, float | int) else list(self.keep)
            if len(shares) != blocks:
                raise ValueError(f"`keep` has {len(shares)} shares for {blocks} blocks in `at`")
            if shares != sorted(set(shares), reverse=True):
                raise ValueError("`keep` must fall from block to block: it is the share of the original patches")
            return self

    config: Config

    @property
    def proportional(self) -> bool:  # type: ignore[override]
        """See the config."""
        return self.config.proportional

    def decide(self, ctx: VisionContext) -> Reduction | None:
        """See the class."""
        hidden, size, movable = ctx.hidden, ctx.size, ctx.movable
        left, keep = int(movable.sum()), self.keep_count(ctx)
        if left == keep:
            return None
        fixed = ctx.n - left
        # target: where each token of the start goes; index: the columns of those that are left.
        index = target = torch.arange(ctx.n, device=hidden.device).expand(ctx.frames, -1)
        while left > keep:
            merges = min(left - keep, max(left // ROUND, 1))
            left -= merges
            counts = (fixed + left,) * ctx.frames
            step = Reduction(bipartite_target(hidden, movable, merges), counts=counts)
            target = target.scatter(1, index, index.gather(1, step.target)).gather(1, target)
            reduced = step.apply(hidden, size)
            assert reduced.hidden is not None
            hidden, size, movable = reduced.hidden, reduced.size, movable[: fixed + left]
            index = index.gather(1, reduced.index)
        return Reduction(target, counts=counts)
