"""Near-identical frames go through the vision tower once.

In the spirit of video codecs, which do not send again what stands still; no published method. The measure is meant for small
things that move: a frame counts as the same only if every patch of it does.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from tokenreduce.reduction import Reduction
from tokenreduce.strategy import Capabilities
from tokenreduce.vision import VisionContext, VisionStageConfig, VisionStrategy


class FrameReuse(VisionStrategy):
    """A frame that nowhere differs by more than `threshold` from the last encoded one gets that frame's features.

    The difference of two frames is the mean absolute difference of the pixels within a patch, of the patch where it is largest:
    a mean over the whole frame would lose a moving digit. Because frames are held to the last *encoded* one, slow changes do
    not add up unseen. Videos of a batch
    are looked at one by one.
    """

    name = "frame_reuse"
    capabilities = Capabilities(sites=("vision.input",), merges=True, content_dependent=True)

    class Config(VisionStageConfig):
        """Fields of a frame_reuse stage."""

        strategy: Literal["frame_reuse"] = "frame_reuse"
        threshold: float = Field(
            0.0,
            ge=0,
            description="Largest difference of a patch, in units of the tower's normalised pixels (SigLIP: black −1, white 1). "
            "0: bit-identical frames only, which changes nothing.",
        )

    config: Config

    def __init__(self, config: VisionStageConfig) -> None:
        super().__init__(config)
        self.lossless = self.config.threshold == 0

    def decide(self, ctx: VisionContext) -> Reduction:
        """See the class. One device synchronisation for all frames."""
        encoded, number = ctx.hidden[0], torch.zeros((), dtype=torch.long, device=ctx.hidden.device)
        targets = [number]
        for frame in range(1, ctx.frames):
            same = self._same(ctx.hidden[frame], encoded)
            encoded = torch.where(same, encoded, ctx.hidden[frame])
            number = torch.where(same, number, frame)
            targets.append(number)
        # `plain`, because the frame that was encoded stands for the others as it is: there is nothing to average.
        return Reduction.merge(torch.stack(targets)[None], "plain")

    def _same(self, frame: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        """() bool, for two frames (n, P). NaN is like nothing."""
        if self.config.threshold == 0:
            return (frame == encoded).all()
        difference = (frame.float() - encoded.float()).abs().mean(-1)
        return (difference <= self.config.threshold).all()
