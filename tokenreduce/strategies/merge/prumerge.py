"""PruMerge and PruMerge+: tokens that stand out in the tower's attention stay and take up their neighbours.

Paper: Shang et al., LLaVA-PruMerge: Adaptive Token Reduction (ICCV 2025), §3.2 for the choice, §3.3 for merging.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenreduce.ops.choose import directions
from tokenreduce.reduction import Mixture, Reduction
from tokenreduce.strategies.at_tower import TowerConfig, TowerStrategy
from tokenreduce.strategy import Capabilities, CountView, Outcome, StageContext


class PruMerge(TowerStrategy):
    """Per frame: tokens above Q3 + 1.5 IQR of the attention stay, as many more as `plus` takes at an even stride. Each gets the
    sum of attention × token over its `neighbours` by the tower's keys; one token more stands for all that are dropped.

    With `keep` or a budget the count is given instead. Flat attention leaves the one token for all (the public code keeps none,
    or divides by zero); a stride's tokens are never kept twice. Attention is the mean over heads, the public code does not part
    them.
    """

    name = "prumerge"
    more = ("tower.keys",)
    capabilities = Capabilities(sites=("pre_attention",), chooses_count=True, merges=True, content_dependent=True)

    class Config(TowerConfig):
        """Fields of a prumerge stage."""

        strategy: Literal["prumerge"] = "prumerge"
        adaptive: bool = Field(
            True, description="Outliers of the attention decide how many stay; false: `keep` or the budget."
        )
        plus: bool = Field(
            False, description="PruMerge+: keep tokens at an even stride as well; they come on top of `keep`."
        )
        neighbours: int = Field(32, ge=1, description="Tokens that a kept one takes up.")

    config: Config

    def needs_budget(self) -> bool:
        """Where neither outliers nor `keep` say how many stay."""
        return not self.config.adaptive and self.config.keep is None

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        frames, received = ctx.groups("frame"), self.received(ctx)
        keys = directions(ctx.tower.keys(self.config.block).nan_to_num(0.0))
        target = torch.where(ctx.reducible, -1, torch.arange(ctx.n, device=received.device))
        given = None if self.config.adaptive else ctx.share(self.keep_count(ctx), frames, frames.sizes, least=1)
        edges: list[tuple[Tensor, Tensor, Tensor]] = []
        for frame in range(len(frames)):
            own = frames.mask(frame).nonzero().squeeze(1)
            kept, dropped = self._chosen(received[own], None if given is None else given[frame])
            near = keys[own][kept] @ keys[own].T
            near[torch.arange(len(kept), device=own.device), kept] = -torch.inf
            found = near.topk(min(self.config.neighbours, len(own) - 1)).indices
            target[own[kept]] = own[kept]
            edges.append((own[kept], own[kept], torch.ones_like(received[own[kept]])))
            edges.append(
                (own[kept].repeat_interleave(found.shape[1]), own[found.flatten()], received[own[found.flatten()]])
            )
            if len(dropped):
                # The most attended of the dropped lends its place to the token that stands for them.
                place = own[dropped[:1]]
                target[own[dropped]] = place
                edges.append((place.expand(len(dropped)), own[dropped], received[own[dropped]]))
        into, source, weight = (torch.cat(part) for part in zip(*edges, strict=True)) if edges else (target[:0],) * 3
        return ctx.merge(target, mixture=Mixture(into, source, weight.to(received.dtype)))

    def _chosen(self, received: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
        """Places kept and dropped, both by falling attention. count: of all that remain."""
        order = received.argsort(descending=True, stable=True)
        if count is None:
            low, high = torch.quantile(received, received.new_tensor([0.25, 0.75])).tolist()
            share = int((received > high + 1.5 * (high - low)).sum()) / len(received)
            top = int(len(received) * share)
        else:
            share, top = count / len(received), count - (not self.config.plus and count < len(received))
        kept = torch.zeros(len(received), dtype=torch.bool, device=received.device)
        kept[order[:top]] = True
        if self.config.plus:
            # As published: three times as many where outliers decide, else the middle of each stride.
            step = max(int(1 / share) // (3 if count is None else 1), 1) if share else len(received)
            kept[
                torch.arange(0 if count is None else step // 2, max(len(received) - 1, 1), step, device=received.device)
            ] = True
        return order[kept[order]], order[~kept[order]]

    def forecast(self, view: CountView) -> Outcome:
        """Outliers are taken to be a tenth of the tokens, in the middle of what the paper reports."""
        if self.config.adaptive:
            return Outcome(max(view.reducible_count // 10, 1), assumed="a tenth of the tokens stand out")
        return Outcome(self.keep_count(view))
