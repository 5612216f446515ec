"""VisionZip: the tokens that the tower attends to most stay, the others are summed up in a few.

Paper: Yang et al., VisionZip: Longer is Better but Not Necessary (CVPR 2025), §3.2; 54 + 10 tokens of 576 in its README.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from tokenreduce.ops.choose import directions
from tokenreduce.ops.cluster import nearest
from tokenreduce.reduction import Mixture, Reduction
from tokenreduce.strategies.at_tower import TowerConfig, TowerStrategy
from tokenreduce.strategy import Capabilities, StageContext


class VisionZip(TowerStrategy):
    """Per frame: dominant tokens by attention; of the others every so manieth is a target, to which the rest go by the cosine of
    the tower's keys. A target becomes itself plus the mean of its own, as published (twice the norm of a token).

    The public code keeps the class token as well; it has no place in a decoder's prompt here.
    """

    name = "visionzip"
    more = ("tower.keys",)
    capabilities = Capabilities(sites=("pre_attention",), chooses_count=True, merges=True)

    class Config(TowerConfig):
        """Fields of a visionzip stage."""

        strategy: Literal["visionzip"] = "visionzip"
        contextual: float = Field(10 / 64, ge=0, le=1, description="Share of the kept tokens that sum up the others.")

    config: Config

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        frames, received = ctx.groups("frame"), self.received(ctx)
        counts = ctx.share(self.keep_count(ctx), frames, frames.sizes)
        heads = len(ctx.tower.attention(self.config.block, self.config.rows, heads="each"))
        keys = directions(ctx.tower.keys(self.config.block).nan_to_num(0.0).unflatten(-1, (heads, -1)).mean(1))
        target = torch.where(ctx.reducible, -1, torch.arange(ctx.n, device=received.device))
        into, source, weight = [], [], []
        for frame, count in enumerate(counts):
            own = frames.mask(frame).nonzero().squeeze(1)
            few = round(count * self.config.contextual)
            order = received[own].argsort(descending=True, stable=True)
            dominant, rest = own[order[: count - few]], own[order[count - few :].sort().values]
            target[dominant] = dominant
            step = max(1, len(rest) // few) if few else 1
            chosen = torch.zeros(len(rest), dtype=torch.bool, device=own.device)
            chosen[torch.arange(0, len(rest), step, device=own.device)[:few]] = True
            heads_of, others = rest[chosen], rest[~chosen]
            target[heads_of] = heads_of
            if not len(heads_of) or not len(others):
                continue
            assigned = nearest(keys[others], keys[heads_of])
            target[others] = heads_of[assigned]
            members = torch.bincount(assigned, minlength=len(heads_of)).to(received.dtype)
            into += [heads_of, heads_of[assigned]]
            source += [heads_of, others]
            weight += [torch.ones_like(members), 1 / members[assigned]]
        if not into:
            return ctx.merge(target)
        return ctx.merge(target, mixture=Mixture(torch.cat(into), torch.cat(source), torch.cat(weight)))
