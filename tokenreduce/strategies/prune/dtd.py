"""DTD: drop what looks like the same place of the frame before.

Paper: Yao et al., TimeChat-Online (ACM MM 2025), §3.2 Differential Token Drop, feature level; threshold 0.5 in its README.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tokenreduce.ops.similarity import cosine_to, previous_in_slot
from tokenreduce.reduction import Reduction
from tokenreduce.strategies.at_input import InputConfig
from tokenreduce.strategy import Capabilities, CountView, Outcome, StageContext, Strategy


class Dtd(Strategy):
    """Drop a token whose cosine to its predecessor in the slot is above `threshold`; the first frame stays.

    The predecessor is the token of the frame before as it came in, kept or not, so slow drift is never refreshed (as
    published; `similarity_merge` compares with what survived). `relative` drops that share of every frame after the first
    instead; without either, the most similar go, as many as the budget asks. The public code's pixel mode is
    not offered: a decoder sees no pixels.
    """

    name = "dtd"
    capabilities = Capabilities(sites=("pre_attention",), chooses_count=True, content_dependent=True)

    class Config(InputConfig):
        """Fields of a dtd stage."""

        strategy: Literal["dtd"] = "dtd"
        threshold: float | None = Field(None, ge=-1, le=1, description="Cosine above which a token is dropped.")
        relative: float | None = Field(
            None, ge=0, le=1, description="Share of each frame after the first that is dropped instead, rounded down."
        )

        @model_validator(mode="after")
        def _one(self) -> Dtd.Config:
            if sum(x is not None for x in (self.threshold, self.relative, self.keep)) > 1:
                raise ValueError("a dtd stage says one of `threshold`, `relative` and `keep`")
            return self

    config: Config

    @property
    def fixed_count(self) -> bool:
        """All but a threshold."""
        return self.config.threshold is None

    def needs_budget(self) -> bool:
        """Where nothing else says how many go."""
        return self.config.threshold is None and self.config.relative is None and self.config.keep is None

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        previous = previous_in_slot(ctx.slot, ctx.medium, ctx.reducible)
        similarity = cosine_to(ctx.hidden, previous)
        if self.config.threshold is not None:
            return ctx.keep(similarity <= self.config.threshold)
        if self.config.relative is None:
            return ctx.keep_top(-similarity, self.keep_count(ctx))
        frames = ctx.groups("frame")
        first = frames.first(previous) < 0
        share = self.config.relative
        counts = [
            size if new else size - int(size * share) for size, new in zip(frames.counts, first.tolist(), strict=True)
        ]
        return ctx.keep_top(-similarity, per=frames, counts=counts)

    def forecast(self, view: CountView) -> Outcome:
        """A threshold is taken to drop what `view.similar` says, a share to do so in every frame but one."""
        if self.config.threshold is not None:
            gone = int(view.similar * view.reducible_count)
            return Outcome(view.reducible_count - gone, assumed=f"{view.similar:.0%} of the tokens are similar")
        if self.config.relative is not None:
            size = view.reducible_count // max(view.frames, 1)
            return Outcome(view.reducible_count - (view.frames - 1) * int(size * self.config.relative))
        return Outcome(self.keep_count(view))
