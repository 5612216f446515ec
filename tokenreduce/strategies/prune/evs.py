"""EVS: keep the tokens that differ most from the same place of the frame before.

Method: NVIDIA, Efficient Video Sampling (2025, arXiv 2510.14624), §3, as served by vLLM and SGLang. The first frame always stays.
"""

from __future__ import annotations

from typing import Literal

import torch

from tokenreduce.ops.similarity import cosine_to, previous_in_slot
from tokenreduce.reduction import Reduction
from tokenreduce.strategies.at_input import InputConfig
from tokenreduce.strategy import Capabilities, StageContext, Strategy


class Evs(Strategy):
    """Over the whole video, keep the tokens of highest 1 − cosine to their predecessor in the slot; the first frame counts as
    new.

    A share below the first frames' is raised to them, as published; a budget below them is refused by name.
    """

    name = "evs"
    capabilities = Capabilities(sites=("pre_attention",), chooses_count=True)

    class Config(InputConfig):
        """Fields of an evs stage."""

        strategy: Literal["evs"] = "evs"

    config: Config

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        previous = previous_in_slot(ctx.slot, ctx.medium, ctx.reducible)
        similarity = cosine_to(ctx.hidden, previous)
        # A zero vector resembles nothing: its cosine is 0, as torch's cosine_similarity has it.
        dissimilarity = torch.where(previous < 0, torch.inf, 1 - similarity.clamp(min=-1.0).nan_to_num())
        dissimilarity = torch.where((previous >= 0) & similarity.isneginf(), 1.0, dissimilarity)
        count, new = self.keep_count(ctx), int((ctx.reducible & (previous < 0)).sum())
        if count < new:
            if self.config.keep is None:
                raise ctx.refusal(
                    new, f"evs may keep {count} vision tokens, and the first frame, which stays, has {new}"
                )
            count = new
        return ctx.keep_top(dissimilarity, count)
