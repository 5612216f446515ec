"""FasterVLM: keep the vision tokens that the tower's class token attends to most.

Paper: Zhang et al., [CLS] Attention is All You Need for Training-Free Visual Token Pruning (2024), §3.3, as ported by
LightCompress.
"""

from __future__ import annotations

from typing import Literal

from tokenreduce.reduction import Reduction
from tokenreduce.strategies.at_tower import TowerConfig, TowerStrategy
from tokenreduce.strategy import StageContext


class FasterVLM(TowerStrategy):
    """Per frame, the tokens of highest attention, mean over heads; frames get alike."""

    name = "fastervlm"

    class Config(TowerConfig):
        """Fields of a fastervlm stage."""

        strategy: Literal["fastervlm"] = "fastervlm"

    config: Config

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        frames = ctx.groups("frame")
        counts = ctx.share(self.keep_count(ctx), frames, frames.sizes)
        return ctx.keep_top(self.received(ctx), per=frames, counts=counts)
