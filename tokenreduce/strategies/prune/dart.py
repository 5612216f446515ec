"""DART: keep a few pivots and what is least like them.

Paper: Wen et al., Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More (2025), §3.3, as
ported by LightCompress: four pivots of vision and four of text, before layer 2, 77.8 % removed.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from tokenreduce.amounts import Keep, Layer
from tokenreduce.layout import QUESTION, TAIL
from tokenreduce.ops.choose import directions
from tokenreduce.ops.groups import shared
from tokenreduce.reduction import Reduction
from tokenreduce.strategy import Capabilities, CountView, Outcome, StageConfig, StageContext, Strategy


class Dart(Strategy):
    """Pivots are the tokens whose keys in the layer before have the largest L1 norm, of the video and of the words after it. The
    video's pivots stay; then each pivot in turn takes its share of the count: the unused vision tokens of lowest cosine to it.

    Pivots are served by place; `order: released` serves them in the order of a Python set of their places, as the port does. It
    compares states after the model's final norm; here they are as they are. Its count is 4 + 8·⌊N(1 − R)/8⌋, ours is exact.
    """

    name = "dart"
    capabilities = Capabilities(sites=("pre_attention",), attention=True, chooses_count=True)

    class Config(StageConfig):
        """Fields of a dart stage."""

        strategy: Literal["dart"] = "dart"
        at: Layer = Field(2, description="Layer before which tokens go.")
        vision_pivots: int = Field(4, ge=0, description="Pivots among the vision tokens; they stay.")
        text_pivots: int = Field(4, ge=0, description="Pivots among the words after the video.")
        order: Literal["place", "released"] = Field("place", description="In which order pivots take their tokens.")
        keep: Keep | None = Field(None, description="How many vision tokens remain; left out: solved from the budget.")

    config: Config

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        count, norm = self.keep_count(ctx), ctx.keys.abs().sum((0, 2))
        words = (ctx.role == QUESTION) | (ctx.role == TAIL)
        own = _largest(norm, ctx.reducible, min(self.config.vision_pivots, count))
        pivots = own + _largest(norm, words, self.config.text_pivots)
        served = list(set(pivots)) if self.config.order == "released" else sorted(pivots)
        kept = torch.zeros_like(ctx.reducible)
        kept[own] = True
        more = count - len(own)
        u = directions(ctx.hidden)
        for pivot, share in zip(served, shared(more, [more] * len(served)), strict=True):
            cosine = torch.where(ctx.reducible & ~kept, u @ u[pivot], torch.inf)
            kept[cosine.argsort(stable=True)[:share]] = True
        return ctx.keep(kept) if served else ctx.keep_top(norm, count)

    def forecast(self, view: CountView) -> Outcome:
        """The count, after the look at the layer before has been paid for."""
        view.attention("last")
        return super().forecast(view)


def _largest(norm: torch.Tensor, inside: torch.Tensor, count: int) -> list[int]:
    """Places of the `count` tokens of largest norm, of those inside."""
    place = inside.nonzero().squeeze(1)
    order: list[int] = place[norm[place].argsort(descending=True, stable=True)[:count]].tolist()
    return order
