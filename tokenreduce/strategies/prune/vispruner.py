"""VisPruner: half of the tokens by the tower's attention, half by being unlike the others.

Paper: Zhang et al., Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning (ICCV 2025), §3.3.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenreduce.ops.choose import directions
from tokenreduce.ops.matching import matching_round
from tokenreduce.reduction import Reduction
from tokenreduce.strategies.at_tower import TowerConfig, TowerStrategy
from tokenreduce.strategy import StageContext

ROUND = 8
"""Tokens that a round drops at most, public code."""


class VisPruner(TowerStrategy):
    """Per frame: the share `important` of its count by attention; of the rest, in falling order of attention, rounds drop the
    even places that resemble an odd place most until the count is left.

    Rounds drop at most what they can, so the count is exact; the public code raises on odd lists and small counts, or returns
    another count without an error. It matches the tower's output; a decoder's stage has the projected states.
    """

    name = "vispruner"

    class Config(TowerConfig):
        """Fields of a vispruner stage."""

        strategy: Literal["vispruner"] = "vispruner"
        important: float = Field(0.5, ge=0, le=1, description="Share of the kept tokens that is chosen by attention.")

    config: Config

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        frames, received = ctx.groups("frame"), self.received(ctx)
        counts = ctx.share(self.keep_count(ctx), frames, frames.sizes)
        mask = torch.zeros_like(ctx.reducible)
        for frame, count in enumerate(counts):
            own = frames.mask(frame).nonzero().squeeze(1)
            order = own[received[own].argsort(descending=True, stable=True)]
            first = int(count * self.config.important)
            mask[order[:first]] = True
            mask[self._unlike(ctx.hidden, order[first:], count - first)] = True
        return ctx.keep(mask)

    def _unlike(self, hidden: Tensor, rest: Tensor, count: int) -> Tensor:
        u = directions(hidden[rest])
        while len(rest) > count:
            stay = matching_round(u, min(ROUND, len(rest) - count)).stay if count else rest[:0]
            rest, u = rest[stay], u[stay]
        return rest
