"""MMTok: the vision tokens that together cover the question and the picture best.

Paper: Dong et al., MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs (ICLR 2026), §3; temperatures 0.02
and 0.2 and α = 0.5 of its wrapper.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenreduce.layout import QUESTION
from tokenreduce.ops.choose import cosine_blocks, directions, earliest
from tokenreduce.reduction import Reduction
from tokenreduce.strategies.at_input import InputConfig
from tokenreduce.strategy import Capabilities, StageContext, Strategy


class MMTok(Strategy):
    """Greedy choice of the token that adds most to the sum of maxima over two kinds of rows: the question's words and the tokens
    themselves, each row a softmax over the tokens.

    What a token adds only falls while others are chosen, so stale sums are upper bounds and few are looked at again: the choice
    is that of the full N × N matrix, which is never held (O(N²·D) time once, O(N·D) for each look, and a device synchronisation
    for each). The public code covers the tower's output; override `pictured` where it is at hand.
    """

    name = "mmtok"
    capabilities = Capabilities(sites=("pre_attention",), chooses_count=True)

    class Config(InputConfig):
        """Fields of an mmtok stage."""

        strategy: Literal["mmtok"] = "mmtok"
        alpha: float = Field(0.5, ge=0, description="α: weight of the tokens' own rows.")
        text_temperature: float = Field(0.02, gt=0, description="Of the softmax of a word over the tokens.")
        vision_temperature: float = Field(0.2, gt=0, description="Of the softmax of a token over the tokens.")

    config: Config

    def pictured(self, ctx: StageContext) -> Tensor:
        """(n, E): what the tokens' own rows compare."""
        return ctx.hidden

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        config, own, count = self.config, ctx.reducible.nonzero().squeeze(1), self.keep_count(ctx)
        words = directions(ctx.hidden[ctx.role == QUESTION].float())
        text = (words @ directions(ctx.hidden[own].float()).T / config.text_temperature).softmax(-1) / max(
            len(words), 1
        )
        u = directions(self.pictured(ctx)[own].float())
        total, bound = u.new_zeros(len(u)), text.sum(0)
        weight = config.alpha / max(len(u), 1)
        for part, cosine in cosine_blocks(u, u):
            total[part] = (cosine / config.vision_temperature).logsumexp(1)
            bound += (cosine / config.vision_temperature - total[part, None]).exp().sum(0) * weight
        covered, seen = u.new_zeros(len(u)), text.new_zeros(len(text))
        scores = torch.zeros(ctx.n, device=own.device)
        for _ in range(count):
            fresh: set[int] = set()
            while True:
                chosen = int(earliest(bound))
                column = (u @ u[chosen] / config.vision_temperature - total).exp() * weight
                if chosen in fresh:
                    break
                bound[chosen] = (column - covered).clamp(min=0).sum() + (text[:, chosen] - seen).clamp(min=0).sum()
                fresh.add(chosen)
            covered, seen = torch.maximum(covered, column), torch.maximum(seen, text[:, chosen])
            bound[chosen] = -torch.inf
            scores[own[chosen]] = 1
        return ctx.keep_top(scores, count)
