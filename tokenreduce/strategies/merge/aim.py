"""AIM, before the decoder: the tokens of each frame are merged by twos, twice.

Paper: Zhong et al., AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning (ICCV 2025), §3.1. Its second part,
pruning inside the decoder, is `aim_prune`.
"""

from __future__ import annotations

from typing import Literal

import torch

from tokenreduce.ops.choose import directions
from tokenreduce.ops.matching import matching_round
from tokenreduce.reduction import Reduction
from tokenreduce.strategies.at_input import InputConfig
from tokenreduce.strategy import Capabilities, StageContext, Strategy


class Aim(Strategy):
    """Bipartite rounds inside each frame until its share is left, each merging at most half; 25 % is two rounds.

    A round averages rows as they are: one that already stands for several tokens counts once. Frames that are too small to merge
    stay (the public code fails below four tokens).
    """

    name = "aim"
    capabilities = Capabilities(sites=("pre_attention",), chooses_count=True, merges=True)

    class Config(InputConfig):
        """Fields of an aim stage."""

        strategy: Literal["aim"] = "aim"

    config: Config

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        frames = ctx.groups("frame")
        counts = ctx.share(self.keep_count(ctx), frames, frames.sizes, least=1)
        target = torch.arange(ctx.n, device=ctx.hidden.device)
        weights = torch.ones(ctx.n, device=target.device, dtype=torch.promote_types(ctx.hidden.dtype, torch.float32))
        for frame, count in enumerate(counts):
            own = frames.mask(frame).nonzero().squeeze(1)
            target[own], weights[own] = merged_in_rounds(ctx.hidden[own], own, count)
        target = torch.where(ctx.reducible, target, torch.arange(ctx.n, device=target.device))
        return ctx.merge(target, weights=weights)


def merged_in_rounds(x: torch.Tensor, places: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets (n,) long and weights (n,) float that leave `count` of the rows x (n, D), which lie at `places` (n,) long."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    weights, target = x.new_ones(len(x)), torch.arange(len(x), device=x.device)
    rows = target  # Which original each row of the current list stands at.
    while len(rows) > count:
        gone, into, stay = matching_round(directions(x), min(len(rows) // 2, len(rows) - count))
        members = x.new_ones(len(rows)).index_add_(0, into, x.new_ones(len(into)))
        x = (x.index_add(0, into, x[gone]) / members[:, None])[stay]
        step = torch.arange(len(places), device=x.device)
        step[rows[gone]] = rows[into]
        share = torch.ones_like(weights)
        share[rows] = 1 / members
        target = step[target]
        weights, rows = weights * share[target], rows[stay]
    return places[target], weights
