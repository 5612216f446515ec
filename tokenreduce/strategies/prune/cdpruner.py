"""CDPruner: a set of vision tokens that is both relevant to the question and diverse, by a determinantal point process.

Paper: Zhang et al., CDPruner: Beyond Attention or Similarity (NeurIPS 2025), §3.2 for relevance, §3.3 for the conditional DPP.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenreduce.layout import QUESTION
from tokenreduce.ops.choose import directions, dpp
from tokenreduce.reduction import Reduction
from tokenreduce.strategies.at_input import InputConfig
from tokenreduce.strategy import Capabilities, StageContext, Strategy


class CDPruner(Strategy):
    """Greedy MAP of the DPP with kernel r_i · cos(x_i, x_j) · r_j; r is the relevance of each token, min–max scaled.

    The paper takes relevance from CLIP's image and text embeddings. A decoder has none, so `relevance` is the mean cosine to the
    question's tokens at the site, as in OpenVINO's port; override it where a text tower is at hand. Scaling is per sequence: in
    the public code the same image keeps other tokens in another batch. Equal relevances count as 1. O(N·k·(D + k)) time.
    """

    name = "cdpruner"
    capabilities = Capabilities(sites=("pre_attention",), chooses_count=True)

    class Config(InputConfig):
        """Fields of a cdpruner stage."""

        strategy: Literal["cdpruner"] = "cdpruner"

    config: Config

    def relevance(self, ctx: StageContext) -> Tensor:
        """(n,) float: how much each token has to do with the question; without a question, alike."""
        question = ctx.hidden[ctx.role == QUESTION]
        # The mean cosine to m rows is the product with the mean of their directions.
        return directions(ctx.hidden) @ directions(question).sum(0) / max(len(question), 1)

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        index, count = ctx.reducible.nonzero().squeeze(1), self.keep_count(ctx)
        relevance = self.relevance(ctx)[index]
        low, high = relevance.aminmax() if len(index) else (relevance, relevance)
        quality = torch.where(high > low, (relevance - low + 1e-6) / (high - low), 1.0)
        scores = torch.zeros(ctx.n, device=ctx.hidden.device)
        u = directions(ctx.hidden[index])
        scores[index[dpp(u, quality.to(u.dtype), count)]] = 1
        return ctx.keep_top(scores, count)
