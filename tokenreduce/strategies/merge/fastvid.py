"""FastVID: segments of a video keep salient tokens, and sum up the others in a few of their frames.

Paper: Shen et al., FastVID: Dynamic Density Pruning for Fast Video LLMs (NeurIPS 2025), §3.2 for segments, §3.3 for tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenreduce.layout import NEWLINE
from tokenreduce.ops.choose import directions
from tokenreduce.ops.cluster import nearest, peak_scores
from tokenreduce.ops.groups import shared
from tokenreduce.ops.segments import cut_segments
from tokenreduce.reduction import Mixture, Reduction
from tokenreduce.strategies.at_tower import TowerConfig, TowerStrategy
from tokenreduce.strategy import Capabilities, StageContext

NEIGHBOURS = 4
"""Of the density, public code."""


class FastVID(TowerStrategy):
    """A segment ends where neighbouring frames' pooled features are among the `cuts` least similar or below `threshold`. Of its
    count, `context` is for density peaks in every `stride`-th frame counted from its last, the rest for the most attended of
    each frame. The other tokens of the segment go to the nearest peak of each such frame: w · peak + (1 − w) · their mean, w =
    max(1/(n + 1), β).

    `variant: llava_video` shares a segment's count with remainders; `onevision` counts frame by frame, rounds down, and lets a
    peak be among its own. `row_newlines` keeps the newline of each row that keeps a token, on top of the count, as published.
    """

    name = "fastvid"
    more = ("tower.pooled",)
    capabilities = Capabilities(sites=("pre_attention",), chooses_count=True, merges=True, content_dependent=True)

    class Config(TowerConfig):
        """Fields of a fastvid stage."""

        strategy: Literal["fastvid"] = "fastvid"
        cuts: int = Field(7, ge=0, description="c − 1: cuts at least, where there are so many frames.")
        threshold: float = Field(0.9, ge=-1, le=1, description="τ: cosine of pooled frames below which there is a cut.")
        context: float = Field(0.4, ge=0, le=1, description="d: share of the count for density peaks.")
        stride: int = Field(4, ge=1, description="p: peaks are chosen in every so manieth frame of a segment.")
        beta: float = Field(0.6, ge=0, le=1, description="β: least weight of a peak in its mean.")
        variant: Literal["llava_video", "onevision"] = Field(
            "llava_video", description="Counts and means of which public code."
        )
        row_newlines: bool = Field(False, description="Keep newlines of rows that keep a token, on top of the count.")

    config: Config

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        config, received = self.config, self.received(ctx)
        newline = ctx.reducible & (ctx.marker == NEWLINE)
        seen = torch.where(ctx.reducible & ~newline, ctx.medium * (ctx.frame.max() + 1) + ctx.frame, -1)
        frames, media = ctx.groups(seen), ctx.groups("medium")
        medium = frames.first(media.index)
        pooled = directions(frames.first(ctx.tower.pooled.nan_to_num(0.0)))
        lengths: list[int] = []
        for number in range(len(media)):
            own = pooled[medium == number]
            lengths += (
                cut_segments((own[1:] * own[:-1]).sum(-1).tolist(), config.threshold, config.cuts) if len(own) else []
            )
        places = [frames.mask(frame).nonzero().squeeze(1) for frame in range(len(frames))]
        ends = torch.tensor(lengths).cumsum(0).tolist()
        segments = [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]
        sizes = [sum(len(places[frame]) for frame in segment) for segment in segments]
        target = torch.where(ctx.reducible, -1, torch.arange(ctx.n, device=received.device))
        edges: list[tuple[Tensor, Tensor, Tensor]] = []
        u = directions(ctx.hidden)
        counts = shared(self.keep_count(ctx), sizes, [float(size) for size in sizes])
        for segment, count in zip(segments, counts, strict=True):
            self._segment(ctx.hidden, u, received, [places[frame] for frame in segment], count, target, edges)
        if config.row_newlines:
            line = newline.cumsum(0) - newline.long()
            place = torch.arange(ctx.n, device=target.device)
            stays = (target == place) & ctx.reducible & ~newline
            alive = torch.bincount(line[stays], minlength=int(line.max()) + 1) > 0
            target = torch.where(newline & alive[line], place, target)
        if not edges:
            return ctx.merge(target)
        return ctx.merge(target, mixture=Mixture(*(torch.cat(part) for part in zip(*edges, strict=True))))

    def _segment(
        self,
        x: Tensor,
        u: Tensor,
        received: Tensor,
        frames: list[Tensor],
        count: int,
        target: Tensor,
        edges: list[tuple[Tensor, Tensor, Tensor]],
    ) -> None:
        """Choose and merge in one segment, whose frames' tokens are at `frames`. Writes targets and edges."""
        config, length = self.config, len(frames)
        anchors = list(range(length - 1, -1, -config.stride))
        if config.variant == "onevision":
            each = count // length
            context = int(each * config.context)
            salient = [each - context] * length
            peaks = [context * length // len(anchors)] * len(anchors)
        else:
            context = int(count * config.context)
            salient = list(shared(count - context, [len(own) for own in frames]))
            peaks = list(shared(context, [context] * len(anchors))) if context else [0] * len(anchors)
        rest = []
        for own, few in zip(frames, salient, strict=True):
            order = own[received[own].argsort(descending=True, stable=True)]
            target[order[:few]] = order[:few]
            rest.append(order[few:].sort().values)
        others = torch.cat(rest)
        for anchor, few in zip(anchors, peaks, strict=True):
            own = rest[anchor]
            if not min(few, len(own)):
                continue
            chosen = own[peak_scores(x[own], NEIGHBOURS)[0].argsort(descending=True, stable=True)[:few].sort().values]
            target[chosen] = chosen
            members = others
            if config.variant == "llava_video":
                members = others[~torch.isin(others, chosen)]
            assigned = nearest(u[members], u[chosen])
            total = torch.bincount(assigned, minlength=len(chosen)).to(received.dtype)
            weight = torch.where(total > 0, (1 / (total + 1)).clamp(min=config.beta), torch.ones_like(total))
            edges.append((chosen, chosen, weight))
            edges.append((chosen[assigned], members, ((1 - weight) / total.clamp(min=1))[assigned]))
            merged = (target[members] < 0).nonzero().squeeze(1)
            target[members[merged]] = chosen[assigned[merged]]
