"""PruneVid: still places of a shot become one token, the others are clustered in their frames; later the question chooses.

Paper: Huang et al., PruneVid: Visual Token Pruning for Efficient Video Large Language Models (2024), §3.1 for merging, §3.2 for
the choice. Numbers of its README: a quarter of the frames as clusters, τ = 0.8, half of the tokens, α = 0.4 at layer 10.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenreduce.amounts import layer_of
from tokenreduce.errors import PipelineError
from tokenreduce.layout import QUESTION, TAIL
from tokenreduce.ops.cluster import density_peaks
from tokenreduce.ops.frames import slot_table, still_slots
from tokenreduce.ops.segments import windows_of_clusters
from tokenreduce.reduction import Reduction
from tokenreduce.strategy import Capabilities, CountView, Layer, Outcome, Site, StageConfig, StageContext, Strategy

NEIGHBOURS, FEW = 7, 14
"""Of DPC-KNN; groups up to FEW tokens are not clustered. Public code."""


class PruneVid(Strategy):
    """Frames are clustered into windows; a slot whose mean cosine over a window is above `threshold` becomes its mean, clustered
    with the other still slots; the moving tokens of each frame are clustered too. At `select_at` the share `alpha` of each
    group stays that text attends to most (maximum over heads and words).

    Short videos have one window (the public code raises below seven frames), and each group keeps a token at least. The choice
    acts before the FFN of its layer, so that layer's cache stays whole; the public code cuts it too.
    """

    name = "prunevid"
    capabilities = Capabilities(
        sites=("pre_attention", "pre_ffn"), attention=("pre_ffn",), merges=True, content_dependent=True
    )

    class Config(StageConfig):
        """Fields of a prunevid stage."""

        strategy: Literal["prunevid"] = "prunevid"
        at: Layer = Field(0, description="Layer before which tokens are merged.")
        frame_clusters: float = Field(0.25, gt=0, le=1, description="Clusters of frames, as a share of the frames.")
        threshold: float = Field(0.8, ge=-1, le=1, description="τ: mean cosine above which a slot is still.")
        token_clusters: float = Field(0.5, gt=0, le=1, description="Clusters of a group, as a share of its tokens.")
        select_at: Layer | None = Field(10, description="Layer of the choice by attention; null: none.")
        alpha: float = Field(0.4, gt=0, le=1, description="Share of each group that the choice keeps.")

    config: Config

    def schedule(self, depth: int) -> list[Site]:
        """Merging at `at`, the choice at `select_at`."""
        sites = super().schedule(depth)
        if self.config.select_at is None:
            return sites
        layer = layer_of(self.config.select_at, depth)
        if not sites[0].layer <= layer < depth:
            raise PipelineError(f"prunevid: `select_at` is layer {layer}; expected {sites[0].layer} … {depth - 1}")
        return [*sites, Site(layer, "pre_ffn")]

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        return self._choose(ctx) if ctx.site.kind == "pre_ffn" else self._merge(ctx)

    def _merge(self, ctx: StageContext) -> Reduction:
        exact = torch.promote_types(ctx.hidden.dtype, torch.float32)
        target = torch.arange(ctx.n, device=ctx.hidden.device)
        weights = torch.ones(ctx.n, device=target.device, dtype=exact)
        group = torch.full_like(target, -1)
        media, groups = ctx.groups("medium"), 0
        for medium in range(len(media)):
            own = media.mask(medium)
            table, x = slot_table(ctx.frame, ctx.slot, own), ctx.hidden
            for rows in table.split(self._windows(x, table)):
                still = still_slots(x, rows, self.config.threshold)
                tokens = [rows[:, still]] if len(rows) > 1 and bool(still.any()) else []
                tokens += [row[~still][None] for row in rows]
                for block in tokens:
                    block = block[:, (block >= 0).any(0)]
                    group[block] = groups
                    groups += 1
                    self._cluster(x, block, target, weights)
        ctx.state["place"], ctx.state["group"] = ctx.position, group
        return ctx.merge(target, weights=weights)

    def _windows(self, x: Tensor, table: Tensor) -> list[int]:
        """Frames per window. table: (F, S) long, tokens of each frame by slot, −1 for none."""
        clusters = max(int(len(table) * self.config.frame_clusters), 1)
        here = (table >= 0)[..., None]
        means = torch.where(here, x[table.clamp(min=0)], 0).sum(1) / here.sum(1).clamp(min=1)
        return windows_of_clusters(density_peaks(means, clusters, NEIGHBOURS)[1].tolist())

    def _cluster(self, x: Tensor, block: Tensor, target: Tensor, weights: Tensor) -> None:
        """Merge a block (frames, tokens) of places: over its frames, then by clusters. Writes targets and weights."""
        frames, count = block.shape
        if not count:
            return
        means = x[block].to(weights.dtype).mean(0)
        assigned = centres = torch.arange(count, device=x.device)
        if count > FEW:
            centres, assigned = density_peaks(means, int(count * self.config.token_clusters) or 1, NEIGHBOURS)
        members = torch.bincount(assigned, minlength=len(centres))
        target[block] = block[0][centres[assigned]].expand(frames, -1)
        weights[block] = (1 / (members[assigned] * frames)).to(weights.dtype).expand(frames, -1)

    def _choose(self, ctx: StageContext) -> Reduction:
        words = (ctx.role == QUESTION) | (ctx.role == TAIL)
        score = ctx.attention(words.nonzero().squeeze(1), heads="max", rows="max")
        place, group = ctx.state["place"], ctx.state["group"]
        groups = ctx.groups(group[torch.searchsorted(place, ctx.position)])
        counts = [max(int(size * self.config.alpha), 1) for size in groups.counts]
        return ctx.keep_top(score, per=groups, counts=counts)

    def forecast(self, view: CountView) -> Outcome:
        """Still tokens are taken to go but for one frame's, the others to be halved; then the share `alpha`."""
        if view.site.kind == "pre_ffn":
            return Outcome(max(int(view.reducible_count * self.config.alpha), 1), assumed="groups of many tokens")
        still = view.similar * view.reducible_count * (1 - 1 / max(view.frames, 1))
        left = (view.reducible_count - still) * self.config.token_clusters
        return Outcome(max(int(left), 1), assumed=f"{view.similar:.0%} of the tokens stand still")
