"""VidCom2: keep what is unlike the video and unlike its frame, more of it in distinctive frames.

Paper: Liu et al., Video Compression Commander (EMNLP 2025), §3.2 for the frame budget, §3.3 for the token score.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tokenreduce.ops.groups import Groups
from tokenreduce.reduction import Reduction
from tokenreduce.strategies.at_input import InputConfig
from tokenreduce.strategy import Capabilities, StageContext, Strategy

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
"""Of the Gaussian kernels, public code."""
TEMPERATURE = 0.01
"""Of the softmax over frames, public code."""


class VidCom2(Strategy):
    """Per frame, keep the tokens least similar to the centres of the video and of the frame.

    Similarity: a sum of Gaussian kernels over the half of the channels that varies least. Frames get more the less they resemble
    the video. `counts: exact` shares the count among frames by largest remainder; `released` rounds each frame by itself, as
    published, so that the sum is off by a few and `keep: 1` drops tokens.
    """

    name = "vidcom2"
    capabilities = Capabilities(sites=("pre_attention",), chooses_count=True)

    class Config(InputConfig):
        """Fields of a vidcom2 stage."""

        strategy: Literal["vidcom2"] = "vidcom2"
        counts: Literal["exact", "released"] = Field(
            "exact", description="`released`: each frame's count is rounded by itself; needs `keep`."
        )

    config: Config

    @property
    def fixed_count(self) -> bool:
        """Only an exact count is known before the video."""
        return self.config.counts == "exact"

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        frames, count = ctx.groups("frame"), self.keep_count(ctx)
        base = count / max(ctx.reducible_count, 1)
        if self.config.counts == "released" and (share := self.share_at(ctx.site, ctx.depth)) is not None:
            base = float(share)
        score = ctx.hidden.new_zeros(ctx.n, dtype=torch.promote_types(ctx.hidden.dtype, torch.float32))
        scale = score.new_zeros(len(frames))
        media = ctx.groups("medium")
        for medium in range(len(media)):
            inside = media.mask(medium)
            own = frames.index[inside].unique()
            local = Groups(torch.searchsorted(own, frames.index[inside]), len(own))
            score[inside], frame_score = similarities(ctx.hidden[inside], local)
            chance = ((frame_score - frame_score.max()) / TEMPERATURE).softmax(0)
            scale[own] = (base * (1 + chance - chance.mean())).clamp(max=1)
        if self.config.counts == "released":
            # Python's round, like torch's, goes to the even number.
            counts = [max(1, round(float(s) * size)) for s, size in zip(scale.tolist(), frames.counts, strict=True)]
        else:
            counts = list(ctx.share(count, frames, scale * frames.sizes, least=1))
        return ctx.keep_top(-score, per=frames, counts=counts)


def similarities(x: Tensor, frames: Groups) -> tuple[Tensor, Tensor]:
    """(n,) similarity of each token of one video to both centres, (g,) distinctiveness of each frame. x: (n, D)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    steady = x.var(0, correction=0).argsort(stable=True)[: x.shape[1] // 2]
    x = nn.functional.normalize(x[:, steady], dim=-1)
    to_video = _kernels(x - x.mean(0))
    return to_video + _kernels(x - frames.spread(frames.means(x))), -frames.means(to_video)


def _kernels(difference: Tensor) -> Tensor:
    squared = difference.square().sum(-1)
    return sum((torch.exp(-squared / (2 * width)) for width in WIDTHS), torch.zeros_like(squared))
