"""LLaVA-Scissor: tokens that hang together by similarity become one, within frames and then across them.

Paper: Sun et al., LLaVA-Scissor: Token Compression with Semantic Connected Components (2025), §3; τ = 0.9 in its README.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from tokenreduce.ops.choose import directions
from tokenreduce.ops.cluster import components, nearest
from tokenreduce.ops.groups import grouped
from tokenreduce.reduction import Mixture, Reduction
from tokenreduce.strategy import Capabilities, CountView, Layer, Outcome, StageConfig, StageContext, Strategy


class LlavaScissor(Strategy):
    """Components of the graph cosine > `threshold` in each frame, their means; components of those; then every token is added to
    the most similar of them, (component + its tokens) / (1 + their number).

    All nodes are looked at: the public code samples some by a seed and loses members that are two steps from their root. The
    second graph is over the whole video, block by block: O(n²·D) time in its n means, no n×n matrix. Images are apart.
    """

    name = "llava_scissor"
    capabilities = Capabilities(sites=("pre_attention",), merges=True, content_dependent=True)

    class Config(StageConfig):
        """Fields of a llava_scissor stage."""

        strategy: Literal["llava_scissor"] = "llava_scissor"
        at: Layer = Field(0, description="Layer before which the stage acts.")
        threshold: float = Field(0.9, ge=-1, le=1, description="τ: cosine above which two tokens are neighbours.")

    config: Config

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        place = torch.arange(ctx.n, device=ctx.hidden.device)
        target, into, source, weight = place.clone(), [], [], []
        frames, media = ctx.groups("frame"), ctx.groups("medium")
        for medium in range(len(media)):
            own = media.mask(medium).nonzero().squeeze(1)
            x = ctx.hidden[own].to(torch.promote_types(ctx.hidden.dtype, torch.float32))
            u, inside = directions(x), torch.ones(len(own), dtype=torch.bool, device=own.device)
            label = torch.zeros(len(own), dtype=torch.long, device=own.device)
            for frame in frames.index[own].unique():
                local = (frames.index[own] == frame).nonzero().squeeze(1)
                label[local] = local[components(u[local], self.config.threshold)]
            first = grouped(label, inside)
            means = first.means(x)
            second = grouped(components(directions(means), self.config.threshold), inside.new_ones(len(first)))
            centres = second.means(means)
            component = second.index[first.index]
            share = 1 / (first.sizes[first.index] * second.sizes[component]).to(x.dtype)
            assigned = nearest(u, directions(centres))
            total = 1 + torch.bincount(assigned, minlength=len(second)).to(x.dtype)
            # The earliest token of a component stays and takes its state.
            anchor = own[_firsts(component, len(second))]
            target[own] = anchor[assigned]
            target[anchor] = anchor
            into += [anchor[component], anchor[assigned]]
            source += [own, own]
            weight += [share / total[component], 1 / total[assigned]]
        if not into:
            return ctx.merge(target)
        return ctx.merge(target, mixture=Mixture(torch.cat(into), torch.cat(source), torch.cat(weight)))

    def forecast(self, view: CountView) -> Outcome:
        """Each token that resembles its predecessor is taken to fall into a component with it."""
        gone = int(view.similar * view.reducible_count)
        return Outcome(max(view.reducible_count - gone, 1), assumed=f"{view.similar:.0%} of the tokens are similar")


def _firsts(group: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) long: the first place of each group."""
    first = torch.full((count,), len(group), device=group.device)
    return first.scatter_reduce_(0, group, torch.arange(len(group), device=group.device), "amin")
