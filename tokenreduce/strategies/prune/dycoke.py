"""DyCoke, stage 1: in groups of four frames one stays whole and the others keep what changed.

Paper: Tao et al., DyCoke: Dynamic Compression of Tokens (CVPR 2025), §3.2 token temporal merging; 0.7 in its evaluation scripts.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from tokenreduce.errors import UnsupportedError
from tokenreduce.ops.similarity import cosine_to
from tokenreduce.reduction import Reduction
from tokenreduce.strategies.at_input import InputConfig
from tokenreduce.strategy import Capabilities, CountView, Outcome, StageContext, Strategy


class DyCoke(Strategy):
    """Of each four frames the second keeps the tokens least like the first, the fourth those least like the third, the third
    those least like the first; `ratio` of a reduced frame goes. Nothing is merged, as in the public code.

    With a budget or `keep` instead of `ratio`, reduced frames share what the whole ones leave. `released: true` has the public
    code's bounds: the last group's third frame stays whole, an odd last frame is lost, ratios are floats (0.9 of 10 leaves 0
    rather than 1), and four frames or fewer are refused.
    """

    name = "dycoke"
    capabilities = Capabilities(sites=("pre_attention",), chooses_count=True)

    class Config(InputConfig):
        """Fields of a dycoke stage."""

        strategy: Literal["dycoke"] = "dycoke"
        ratio: float | None = Field(None, ge=0, lt=1, description="Share of a reduced frame that is dropped.")
        released: bool = Field(False, description="Loop bounds and rounding of the public code; needs `ratio`.")

    config: Config

    def needs_budget(self) -> bool:
        """Where no ratio is given."""
        return self.config.ratio is None and self.config.keep is None

    def decide(self, ctx: StageContext) -> Reduction:
        """See the class."""
        config = self.config
        frames, media = ctx.groups("frame"), ctx.groups("medium")
        medium = frames.first(media.index)
        numbers = torch.arange(len(frames), device=medium.device)
        start = torch.searchsorted(medium, medium)  # Of each frame's medium; frames are numbered medium by medium.
        place, length = numbers - start, torch.bincount(medium, minlength=len(media))[medium]
        if config.released and int(length.min()) <= 4:
            raise UnsupportedError("dycoke: released: the public code needs five frames or more; leave `released` out")
        reduced = place % 4 != 0
        back = torch.where(place % 4 == 2, 2, 1)
        if config.released:
            reduced &= (place % 4 != 2) | (place < length - 2)
            reduced &= (place % 4 != 2) | (place - 2 < length - 4)
        reference = torch.where(reduced, numbers - back, -1)
        score = cosine_to(ctx.hidden, _same_slot(ctx, frames.index, reference))
        counts = self._counts(ctx, frames.counts, reduced.tolist())
        if config.released:
            lost = ((place == length - 1) & (length % 2 == 1)).tolist()
            counts = [0 if gone else count for count, gone in zip(counts, lost, strict=True)]
        return ctx.keep_top(-score, per=frames, counts=counts)

    def _counts(self, ctx: StageContext, sizes: tuple[int, ...], reduced: list[bool]) -> list[int]:
        config = self.config
        if config.ratio is not None:
            # In decimals: the float product of the public code can be a whole number less.
            left = (1 - config.ratio) if config.released else round(1 - config.ratio, 9)
            slack = 0.0 if config.released else 1e-9
            return [int(left * size + slack) if less else size for size, less in zip(sizes, reduced, strict=True)]
        whole = sum(size for size, less in zip(sizes, reduced, strict=True) if not less)
        count = self.keep_count(ctx)
        if count < whole:
            raise ctx.refusal(
                whole, f"dycoke may keep {count} tokens, and every fourth frame, which stays, has {whole}"
            )
        weights = [float(size * less) for size, less in zip(sizes, reduced, strict=True)]
        groups = ctx.groups("frame")
        more = ctx.share(count - whole, groups, [w or 0.0 for w in weights])
        return [extra if less else size for extra, size, less in zip(more, sizes, reduced, strict=True)]

    def forecast(self, view: CountView) -> Outcome:
        """Counts of frames of one size; without their number, as the budget says."""
        if self.config.ratio is None or view.frames < 1:
            return Outcome(self.keep_count(view))
        size, frames = view.reducible_count // view.frames, view.frames
        whole = -(-frames // 4)
        return Outcome(whole * size + (frames - whole) * int(round(1 - self.config.ratio, 9) * size + 1e-9))


def _same_slot(ctx: StageContext, frame: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(n,) long: the token of the same slot in frame reference[frame], −1 where there is none. frame: (n,), reference: (g,)."""
    width = int(ctx.slot.max()) + 1
    inside = frame >= 0
    table = torch.full((len(reference) * width,), -1, device=frame.device)
    table[(frame * width + ctx.slot)[inside]] = torch.arange(ctx.n, device=frame.device)[inside]
    wanted = reference[frame.clamp(min=0)]
    return torch.where(inside & (wanted >= 0), table[(wanted * width + ctx.slot).clamp(min=0)], -1)
