"""LLaVA-OneVision."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from tokenreduce.adapter import Prompt
from tokenreduce_adapters._anyres import AnyresAdapter, tower_side
from tokenreduce_adapters._runs import Kind, Medium, Places, frame_places


class LlavaOnevisionAdapter(AnyresAdapter):
    """Video: frames of ceil(side / 2)² pooled tokens with nothing between them, then one newline after the last frame.

    The newline belongs to the last frame, in a slot after the patches. An image is an overview, then rows of its tiles,
    each ended by a newline; several images in one sample are an overview and one newline each. Every image is a
    medium of its own.
    """

    name = "llava_onevision"
    model_types = ("llava_onevision",)
    checkpoints = (
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "llava-hf/llava-onevision-qwen2-72b-ov-hf",
    )
    notes = "196 tokens per frame at 384 px, one newline after the last frame; images tiled with a newline per row"

    def tile_limit(self, config: Any) -> int | None:
        return int(config.vision_aspect_ratio.removeprefix("anyres_max_"))

    def pooled_frames(self, model: nn.Module, frames: Tensor) -> Tensor:
        whole: Any = getattr(model, "model", model)
        return whole.apply_pooling(frames)  # type: ignore[no-any-return]

    def lengths(self, model: nn.Module, prompt: Prompt, kind: Kind) -> list[int]:
        if kind == "image":
            return super().lengths(model, prompt, kind)
        videos, frames = prompt.kwargs["pixel_values_videos"].shape[:2]
        return [frames * _per_frame(model.config) + 1] * videos

    def places(self, model: nn.Module, prompt: Prompt, medium: Medium) -> Places:
        if medium.kind == "image":
            return super().places(model, prompt, medium)
        per_frame = _per_frame(model.config)
        patches = frame_places(Medium("video", medium.index, medium.row, medium.columns[:-1]), per_frame, self.name)
        slot = nn.functional.pad(patches.slot, (0, 1), value=per_frame)
        frame = nn.functional.pad(patches.frame, (0, 1), value=int(len(medium) // per_frame) - 1)
        return Places(slot, frame, slot == per_frame).in_rows_of(math.ceil(tower_side(model.config) / 2))


def _per_frame(config: Any) -> int:
    return math.ceil(tower_side(config) / 2) ** 2
