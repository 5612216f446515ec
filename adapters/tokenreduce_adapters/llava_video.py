"""LLaVA-Video."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapter import Prompt
from tokenreduce_adapters._anyres import AnyresAdapter
from tokenreduce_adapters._runs import Kind, Medium, Places, frame_places, runs, settings
from tokenreduce_adapters.llava_onevision import LlavaOnevisionAdapter


class LlavaVideoAdapter(LlavaOnevisionAdapter):
    """Video: frames of rows × (rows + 1) tokens, the last of each row a newline. Images are LLaVA-OneVision's.

    Placeholders with text between them are different videos. So are two videos side by side, unless they came in frame by
    frame, as (frames, 1, 3, H, W) pixels, which is how videos of several lengths make one batch: put text between those.
    """

    name = "llava_video"
    model_types = ("llava_video",)
    checkpoints = (
        "lmms-lab/LLaVA-Video-7B-Qwen2",
        "lmms-lab/LLaVA-Video-72B-Qwen2",
        "lmms-lab/LLaVA-NeXT-Video-32B-Qwen",
    )
    notes = "upstream layout; 14 × 15 tokens per frame (13 × 14 with average pooling), the last of each row a newline"

    def pooled_frames(self, model: nn.Module, frames: Tensor) -> Tensor:
        whole: Any = getattr(model, "model", model)
        return whole.pooled_grid(frames).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]

    def lengths(self, model: nn.Module, prompt: Prompt, kind: Kind) -> list[int]:
        if kind == "image":
            return super().lengths(model, prompt, kind)
        shape = prompt.kwargs["pixel_values_videos"].shape
        videos, frames = shape[:2] if len(shape) == 5 else (1, shape[0])
        return [frames * settings(model).tokens_per_frame] * videos

    def media(self, model: nn.Module, prompt: Prompt, kind: Kind) -> list[Medium]:
        found = super().media(model, prompt, kind)
        if kind == "image":
            return found
        one_frame = settings(model).tokens_per_frame
        loose = all(len(medium) == one_frame for medium in found)
        videos: list[Medium] = []
        for part in (replace(medium, columns=run) for medium in found for run in runs(medium.columns)):
            if loose and videos and _touch(videos[-1], part):
                part = replace(part, columns=torch.cat((videos.pop().columns, part.columns)))
            videos.append(part)
        return videos

    def places(self, model: nn.Module, prompt: Prompt, medium: Medium) -> Places:
        if medium.kind == "image":
            return AnyresAdapter.places(self, model, prompt, medium)
        config = settings(model)
        places = frame_places(medium, config.tokens_per_frame, self.name)
        width = config.rows + 1
        return replace(places, newline=places.slot % width == config.rows).in_rows_of(width)


def _touch(before: Medium, after: Medium) -> bool:
    return before.row == after.row and int(before.columns[-1]) + 1 == int(after.columns[0])
