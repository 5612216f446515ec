"""HoliTom: what stands still over a window of frames is kept once and clustered; of the rest the most attended stays.

Paper: Shao et al., HoliTom: Holistic Token Merging for Fast Video LLMs (NeurIPS 2025), §3.2 for windows, §3.3 for tokens. Its
second part, inside the decoder at layer 18, is a `fastv` stage whose dropped tokens are merged; see docs/methods.md.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenreduce.ops.cluster import density_peaks
from tokenreduce.ops.frames import slot_table
from tokenreduce.ops.groups import shared
from tokenreduce.ops.segments import static_windows
from tokenreduce.ops.similarity import cosine_to
from tokenreduce.reduction import Reduction
from tokenreduce.strategies.at_tower import TowerConfig, TowerStrategy
from tokenreduce.strategy import Capabilities, StageContext


class HoliTom(TowerStrategy):
    """Windows are chosen so that slots which stand still through them, kept once, save most. Still slots become their means, and
    those are clustered; of each frame's other tokens the most attended stay, a share `contextual` of them as clusters instead.

    A cluster is β · centre + (1 − β) · mean of the others. `counts: exact` shares the count among windows and frames by largest
    remainder; `released` rounds each group by itself after raising the ratio by what standing still saves, as published.
    """

    name = "holitom"
    capabilities = Capabilities(sites=("pre_attention",), chooses_count=True, merges=True, content_dependent=True)

    class Config(TowerConfig):
        """Fields of a holitom stage."""

        strategy: Literal["holitom"] = "holitom"
        threshold: float = Field(
            0.8, ge=-1, le=1, description="τ: cosine to the frame before above which a slot stands still."
        )
        contextual: float = Field(0.0, ge=0, le=1, description="D: share of a frame's tokens that are clusters.")
        beta: float | None = Field(
            0.6, ge=0, le=1, description="β: weight of a centre in its cluster; null: the plain mean."
        )
        neighbours: int = Field(7, ge=1, description="K of DPC-KNN.")
        window: int = Field(1024, ge=1, description="Frames of a window at most.")
        counts: Literal["exact", "released"] = Field("exact", description="`released` needs `keep`.")

    config: Config

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        received, x = self.received(ctx), ctx.hidden
        target = torch.where(ctx.reducible, -1, torch.arange(ctx.n, device=x.device))
        weights = torch.ones(ctx.n, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        media = ctx.groups("medium")
        for medium, count in enumerate(ctx.share(self.keep_count(ctx), media, media.sizes)):
            table = slot_table(ctx.frame, ctx.slot, media.mask(medium))
            groups = self._groups(x, table)
            sizes = [block.shape[1] for block in groups]
            counts = list(shared(count, sizes, [float(size) for size in sizes]))
            if self.config.counts == "released":
                counts = self._released(ctx, groups, table)
            for block, few in zip(groups, counts, strict=True):
                if len(block) > 1:
                    self._cluster(x, block, few, target, weights)
                    continue
                own = block[0]
                top = round(few * (1 - self.config.contextual))
                order = own[received[own].argsort(descending=True, stable=True)]
                target[order[:top]] = order[:top]
                self._cluster(x, order[top:].sort().values[None], few - top, target, weights)
        return ctx.merge(target, weights=weights)

    def _groups(self, x: Tensor, table: Tensor) -> list[Tensor]:
        """Blocks (frames, tokens) of places: of each window the still slots, then each frame's others."""
        before = torch.full((len(x),), -1, device=x.device)
        both = (table[1:] >= 0) & (table[:-1] >= 0)
        before[table[1:][both]] = table[:-1][both]
        still = (cosine_to(x, before)[table[1:].clamp(min=0)] > self.config.threshold) & both
        groups, start = [], 0
        for length in static_windows(still, self.config.window):
            rows = table[start : start + length]
            through = still[start : start + length - 1].all(0) & (length > 1)
            groups += [rows[:, through]] if length > 1 else []
            groups += [row[~through & (row >= 0)][None] for row in rows]
            start += length
        return [block for block in groups if block.shape[1]]

    def _released(self, ctx: StageContext, groups: list[Tensor], table: Tensor) -> list[int]:
        share = self.share_at(ctx.site, ctx.depth)
        whole = int((table >= 0).sum())
        ratio = self.keep_count(ctx) / max(ctx.reducible_count, 1) if share is None else float(share)
        saved = sum((len(block) - 1) * block.shape[1] for block in groups)
        ratio = min(1.0, ratio / (1 - saved / whole))
        return [
            round(block.shape[1] * ratio) if len(block) > 1 else math.ceil(block.shape[1] * ratio) for block in groups
        ]

    def _cluster(self, x: Tensor, block: Tensor, few: int, target: Tensor, weights: Tensor) -> None:
        """Merge a block (frames, tokens) of places over its frames and into `few` clusters. Writes targets and weights."""
        frames, count = block.shape
        few = min(few, count)
        if not few:
            return
        means = x[block].to(weights.dtype).mean(0)
        centres, assigned = density_peaks(means, few, min(self.config.neighbours, few))
        members = torch.bincount(assigned, minlength=few).to(weights.dtype)
        if self.config.beta is None:
            own = other = 1 / members
        else:
            own = torch.where(members > 1, self.config.beta, torch.ones_like(members))
            other = (1 - self.config.beta) / (members - 1).clamp(min=1)
        each = other[assigned]
        each[centres] = own[assigned[centres]]
        target[block] = block[0][centres[assigned]].expand(frames, -1)
        weights[block] = (each / frames).expand(frames, -1)
