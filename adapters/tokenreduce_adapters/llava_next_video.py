"""LLaVA-NeXT-Video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tokenreduce.adapter import Prompt
from tokenreduce_adapters._anyres import AnyresAdapter, tower_side
from tokenreduce_adapters._runs import Kind, Medium, Places, frame_places, settings, square_side
from tokenreduce_adapters._towers import frames_signals


class LlavaNextVideoAdapter(AnyresAdapter):
    """Video: frames of (side / pool stride)² tokens, nothing between them or after. Images as in LLaVA-NeXT."""

    name = "llava_next_video"
    model_types = ("llava_next_video",)
    checkpoints = (
        "llava-hf/LLaVA-NeXT-Video-7B-hf",
        "llava-hf/LLaVA-NeXT-Video-7B-DPO-hf",
        "llava-hf/LLaVA-NeXT-Video-34B-hf",
    )
    notes = "144 tokens per frame at 336 px, no newlines in videos; images tiled with a newline per row"

    def pooled_frames(self, model: nn.Module, frames: Tensor) -> Tensor:
        whole: Any = getattr(model, "model", model)
        return whole.vision_resampler(frames)  # type: ignore[no-any-return]

    def tower_signals(self, model: nn.Module) -> Mapping[str, str]:
        if settings(model).spatial_pool_mode == "conv":
            return dict.fromkeys(frames_signals(model), "it pools by a convolution, which mixes features")
        return frames_signals(model)

    def lengths(self, model: nn.Module, prompt: Prompt, kind: Kind) -> list[int]:
        if kind == "image":
            return super().lengths(model, prompt, kind)
        videos, frames = prompt.kwargs["pixel_values_videos"].shape[:2]
        return [frames * _per_frame(model)] * videos

    def places(self, model: nn.Module, prompt: Prompt, medium: Medium) -> Places:
        if medium.kind == "image":
            return super().places(model, prompt, medium)
        per_frame = _per_frame(model)
        return frame_places(medium, per_frame, self.name).in_rows_of(square_side(per_frame))


def _per_frame(model: nn.Module) -> int:
    config = settings(model)
    return int((tower_side(config) // config.spatial_pool_stride) ** 2)
