"""V-CAST: frames where the video turns get more tokens; in a frame, what is unlike its mean and strong stays.

Paper: V-CAST (2026), public code modeling_qwen3_vl_v_cast.py; share 0.25 and temperature 0.7 are its defaults.
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


class VCast(Strategy):
    """Curvature of the path of frame means gives each frame its share, 1 − cosine to that mean plus norm ranks its tokens.

    `rounding: largest_remainder` gives each frame its exact share; `released` gives all that the floors leave over to one
    frame until it is full. A still pair of frames has curvature 1, as much as the sharpest turn: as published.
    """

    name = "v_cast"
    capabilities = Capabilities(sites=("pre_attention",), chooses_count=True)

    class Config(InputConfig):
        """Fields of a v_cast stage."""

        strategy: Literal["v_cast"] = "v_cast"
        temperature: float = Field(0.7, gt=0, description="Of the softmax over the frames' curvature.")
        least: int = Field(1, ge=0, description="Tokens that every frame keeps; a smaller `keep` is raised to them.")
        rounding: Literal["largest_remainder", "released"] = Field(
            "largest_remainder", description="Who gets the tokens that rounding down leaves over."
        )

    config: Config

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        frames, media, config = ctx.groups("frame"), ctx.groups("medium"), self.config
        centre = nn.functional.normalize(frames.means(ctx.hidden), dim=-1)
        tokens = nn.functional.normalize(ctx.hidden.to(centre.dtype), dim=-1)
        norm = ctx.hidden.to(centre.dtype).norm(dim=-1)
        low, high = (_edges(norm, frames, kind) for kind in ("amin", "amax"))
        score = 1 - (tokens * frames.spread(centre)).sum(-1)
        score = score + (norm - frames.spread(low)) / frames.spread(high - low + 1e-6)
        weights = (curvature(centre, frames.first(media.index)) / config.temperature).softmax(0)
        count, floor = self.keep_count(ctx), sum(min(config.least, size) for size in frames.counts)
        if count < floor:
            if config.keep is None:
                raise ctx.refusal(floor, f"v_cast may keep {count} tokens, and each of {len(frames)} frames keeps one")
            count = floor
        if config.rounding == "released":
            counts = _to_one(count, frames.counts, weights, config.least)
        else:
            counts = list(ctx.share(count, frames, weights, least=config.least))
        return ctx.keep_top(score, per=frames, counts=counts)


def curvature(centre: Tensor, medium: Tensor) -> Tensor:
    """(g,) 1 − cosine of the steps into and out of each frame mean (g, D); 1 at the ends of a medium (g,)."""
    step = nn.functional.normalize(centre[1:] - centre[:-1], dim=-1)
    out = centre.new_ones(len(centre))
    if len(centre) > 2:
        inner = (medium[2:] == medium[1:-1]) & (medium[1:-1] == medium[:-2])
        out[1:-1] = torch.where(inner, 1 - (step[:-1] * step[1:]).sum(-1), 1.0)
    return out


def _edges(values: Tensor, frames: Groups, kind: str) -> Tensor:
    inside = frames.index >= 0
    out = values.new_zeros(len(frames))
    return out.scatter_reduce_(0, frames.index[inside], values[inside], kind, include_self=False)


def _to_one(total: int, sizes: tuple[int, ...], weights: Tensor, least: int) -> list[int]:
    """Floors of the exact shares; all that is left over to the frame of largest fraction until it is full, then the next."""
    counts = [min(least, size) for size in sizes]
    more = total - sum(counts)
    exact = (weights * more).tolist()
    counts = [min(c + int(x), size) for c, x, size in zip(counts, exact, sizes, strict=True)]
    for frame in sorted(range(len(sizes)), key=lambda frame: int(exact[frame]) - exact[frame]):
        counts[frame] += min(total - sum(counts), sizes[frame] - counts[frame])
    return counts
