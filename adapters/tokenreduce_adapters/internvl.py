"""InternVL in transformers' own form (checkpoints whose names end in -hf)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tokenreduce.adapter import TowerCall, VisionTower
from tokenreduce_adapters._labelled import LabelledAdapter
from tokenreduce_adapters._runs import Kind, settings
from tokenreduce_adapters._towers import frames_signals, frames_tower, shuffled_mean


class InternVLAdapter(LabelledAdapter):
    """A video is written as `Frame1: <img>…</img>`, a line break, `Frame2: <img>…</img>`: one run of ids per frame.

    An image is one run as well: all its tiles, then its thumbnail, so a run longer than one tile is an image, and a
    medium of its own. Single-tile images with equal text between them are read as frames, see `LabelledAdapter`.
    Labels between frames are marked as timestamps; like `<img>` and `</img>` they are text, and stay.
    """

    name = "internvl"
    model_types = ("internvl",)
    checkpoints = (
        "OpenGVLab/InternVL3-1B-hf",
        "OpenGVLab/InternVL3-2B-hf",
        "OpenGVLab/InternVL3-8B-hf",
        "OpenGVLab/InternVL3-38B-hf",
        "OpenGVLab/InternVL3-78B-hf",
    )
    notes = "256 tokens per frame, one <img> run each; single-tile images in a row are read as the frames of a video"
    tags = (1, 1)

    def per_tile(self, config: Any) -> int:
        return int(config.image_seq_length)

    def vision_tower(self, model: nn.Module) -> VisionTower | None:
        return frames_tower(model)

    def tower_signals(self, model: nn.Module) -> Mapping[str, str]:
        return frames_signals(model)

    def tokens_of(self, model: nn.Module, kind: Kind, call: TowerCall) -> Tensor:
        tiles, patches, channels = call.values.shape
        whole: Any = getattr(model, "model", model)
        side = math.isqrt(patches)
        grid = call.values.view(tiles, side, side, channels)
        shuffled: Tensor = whole.pixel_shuffle(grid, scale_factor=settings(model).downsample_ratio)
        return shuffled_mean(shuffled, channels)

    def restarts(self, first: list[int], second: list[int], label: list[int]) -> bool:
        # The first frame's label is as long as the second's without its line break.
        length = len(second) - 1
        return length > 1 and first[-length:] == label[-length:]
