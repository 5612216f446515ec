"""DivPrune: keep the vision tokens that are most unlike each other.

Paper: Alvar et al., DivPrune: Diversity-based Visual Token Pruning (CVPR 2025), §3.2; 9.8 % is kept in its LLaVA script.
"""

from __future__ import annotations

from typing import Literal

import torch

from tokenreduce.ops.choose import directions, max_min
from tokenreduce.reduction import Reduction
from tokenreduce.strategies.at_input import InputConfig
from tokenreduce.strategy import Capabilities, StageContext, Strategy


class DivPrune(Strategy):
    """Greedy max-min of cosine distance over all vision tokens, beginning with the one whose nearest neighbour is farthest.

    The first choice compares all tokens, block by block (O(N²·D) time, O(N·D) memory); the others cost O(N·D) each. The public
    code may choose a token twice, and a zero vector for ever; here a token is chosen once and a zero vector is like no other.
    """

    name = "divprune"
    capabilities = Capabilities(sites=("pre_attention",), chooses_count=True)

    class Config(InputConfig):
        """Fields of a divprune stage."""

        strategy: Literal["divprune"] = "divprune"

    config: Config

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        index = ctx.reducible.nonzero().squeeze(1)
        count = self.keep_count(ctx)
        scores = torch.zeros(ctx.n, device=ctx.hidden.device)
        scores[index[max_min(directions(ctx.hidden[index]), count)]] = 1
        return ctx.keep_top(scores, count)
