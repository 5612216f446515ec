"""SparseVLM: words that look at the picture rate its tokens; the best of the dropped are recycled in clusters.

Paper: Zhang et al., SparseVLM: Visual Token Sparsification for Efficient VLM Inference (ICML 2025), §3.2 for raters, §3.4 for
recycling; 300, 200 and 110 of 576 tokens after layers 2, 6 and 15 at its target of 192.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenreduce.amounts import Keep, Layer
from tokenreduce.layout import QUESTION, TAIL
from tokenreduce.ops.cluster import density_peaks
from tokenreduce.reduction import Reduction
from tokenreduce.strategy import Capabilities, CountView, Decision, Outcome, Site, StageConfig, StageContext, Strategy


class SparseVLM(Strategy):
    """Raters are the words after the video whose mean softmax over words of vision · word exceeds the mean, at layer 0. Before
    each layer of `at`, tokens are ranked by the raters' attention in the layer before; of those that would go, the best
    `recycled` share is clustered, a tenth as many tokens, and stays as means. Counts include them. Where no word stands out, all
    rate.

    Merged tokens stay at the place of their cluster's centre; the public code puts them behind the others.
    """

    name = "sparsevlm"
    capabilities = Capabilities(
        sites=("pre_attention",), attention=True, chooses_count=True, merges=True, across_media=True
    )

    class Config(StageConfig):
        """Fields of a sparsevlm stage."""

        strategy: Literal["sparsevlm"] = "sparsevlm"
        at: Layer | list[Layer] = Field([3, 7, 16], description="Layers before which tokens go.")  # type: ignore[assignment]
        recycled: float = Field(0.3, ge=0, le=1, description="Share of the dropped tokens that is clustered; 0: none.")
        keep: Keep | list[Keep] | None = Field(
            None, description="How many vision tokens stay, clusters included; left out: solved from the budget."
        )

    config: Config

    def schedule(self, depth: int) -> list[Site]:
        """Layer 0, to choose raters, and the layers in `at`."""
        return [Site(0, "pre_attention"), *super().schedule(depth)]

    def reads(self, site: Site) -> bool:
        """Raters are chosen by states."""
        return site.layer > 0

    def keep_at(self, site: Site, depth: int) -> Keep | None:
        """Nothing goes at layer 0."""
        if site.layer == 0:
            return 1
        keep = self.config.keep
        return keep[super().schedule(depth).index(site)] if isinstance(keep, list) else keep

    def decide(self, ctx: StageContext) -> Reduction | Decision:
        """See the class."""
        if ctx.site.layer == 0:
            words = (ctx.role == QUESTION) | (ctx.role == TAIL)
            ctx.state["raters"] = ctx.position[words][raters(early_states(ctx), ctx.reducible, words)]
            return Decision(consumed=False)
        rows = torch.searchsorted(ctx.position, ctx.state["raters"])
        rows = rows if len(rows) else torch.tensor([ctx.n - 1], device=ctx.position.device)
        score = ctx.attention(rows)
        count = self.keep_count(ctx)
        kept, clusters = self._split(ctx.reducible_count, count)
        own = ctx.reducible.nonzero().squeeze(1)
        order = own[score[own].nan_to_num(-torch.inf).argsort(descending=True, stable=True)]
        target = torch.where(ctx.reducible, -1, torch.arange(ctx.n, device=own.device))
        target[order[:kept]] = order[:kept]
        weights = torch.ones(ctx.n, device=own.device)
        if clusters:
            again = order[kept : kept + int(self.config.recycled * (len(own) - kept)) + 1].sort().values
            centres, assigned = density_peaks(ctx.hidden[again], clusters, clusters)
            target[again] = again[centres][assigned]
            weights[again] = 1 / torch.bincount(assigned, minlength=len(centres))[assigned].to(weights.dtype)
        return ctx.merge(target, weights=weights)

    def _split(self, now: int, count: int) -> tuple[int, int]:
        """Tokens that stay as they are and clusters of the others, `count` together."""
        if count >= now or not self.config.recycled:
            return min(count, now), 0
        for kept in range(count - 1, -1, -1):
            clusters = int((int(self.config.recycled * (now - kept)) + 1) / 10) + 1
            if kept + clusters <= count:
                return kept, count - kept
        return count, 0

    def forecast(self, view: CountView) -> Outcome:
        """Nothing at layer 0; then the count."""
        if view.site.layer == 0:
            return Outcome(view.reducible_count, consumed=False)
        view.attention("last")
        return Outcome(self.keep_count(view))


def early_states(ctx: StageContext) -> Tensor:
    """(n, D): the states that enter layer 0."""
    return ctx.hidden


def raters(x: Tensor, vision: Tensor, words: Tensor) -> Tensor:
    """(w,) bool: words whose share in the mean softmax over words of vision · word is above average; all where none is."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if not bool(words.any()):
        return words[words]
    share = (x[vision] @ x[words].T).softmax(-1).mean(0)
    found = share > share.mean()
    return found | ~found.any()
