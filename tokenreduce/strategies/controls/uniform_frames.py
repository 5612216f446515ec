"""Control: whole frames at even distances, the paper's "Original*" (a lower frame rate, §5.2)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from tokenreduce.reduction import Reduction
from tokenreduce.strategy import Capabilities, CountView, Keep, Layer, Outcome, StageConfig, StageContext, Strategy


class UniformFrames(Strategy):
    """Keep as many evenly spaced frames as the budget holds, and drop the others whole.

    The vision tower still sees all frames and positions stay the originals; a model given fewer frames would also be told
    other frame times. The count is a whole number of frames, so up to one frame less than the budget.
    """

    name = "uniform_frames"
    capabilities = Capabilities(sites=("pre_attention",), chooses_count=True)

    class Config(StageConfig):
        """Fields of a uniform_frames stage."""

        strategy: Literal["uniform_frames"] = "uniform_frames"
        at: Layer = Field(0, description="Layer before which the frames go.")
        keep: Keep | None = Field(
            None, description="Share or number of vision tokens that may remain; left out: from the budget."
        )

    config: Config

    def measure(self, ctx: StageContext) -> torch.Tensor:
        """(n,) long: each token's frame, −1 for what may not go. Frames of all media in the order of the input."""
        return torch.where(ctx.reducible, ctx.medium * (ctx.frame.max() + 1) + ctx.frame, -1)

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        count, key = self.keep_count(ctx), torch.tensor(self.measured(ctx))
        frames, sizes = key[key >= 0].unique(return_counts=True)
        # No frame is smaller than the smallest: a bound that is met at once where all are alike.
        for kept in range(min(len(frames), count // int(sizes.min())), 0, -1):
            places = _spread(kept, len(frames))
            left = int(sizes[places].sum())
            if left <= count:
                return _whole_frames(ctx, key, frames[places], left)
        self._first(ctx, count, int(sizes[0]))
        return _whole_frames(ctx, key, frames[:1], int(sizes[0]))

    def forecast(self, view: CountView) -> Outcome:
        """Whole frames, taking all to be of one size, at least one; where nothing is known of frames, the allowance."""
        count, size, least = self.keep_count(view), max(view.reducible_count // view.frames, 1), view.whole_frame
        if view.contents is None:
            return Outcome(count)
        whole = count // size * size
        return Outcome(whole if whole >= least else self._first(view, count, least))

    def _first(self, ctx: StageContext | CountView, count: int, size: int) -> int:
        return ctx.at_least(size, f"uniform_frames may keep {count} vision tokens, and its first frame has {size}")


def _whole_frames(ctx: StageContext, key: torch.Tensor, frames: torch.Tensor, left: int) -> Reduction:
    """Keep the tokens whose `key` (n,) is one of `frames`, `left` of them, and what may not go."""
    stays = (torch.isin(key, frames) | (key < 0)).to(ctx.reducible.device)
    kept = Reduction.keep(stays[None], counts=(ctx.n - ctx.reducible_count + left,))
    return replace(kept, proven=True)


def _spread(kept: int, total: int) -> list[int]:
    """`kept` of `total` places at even distances, the first included: floor(i · total / kept)."""
    return [i * total // kept for i in range(kept)]
