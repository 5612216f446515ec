"""Families for conversations of several turns: some of `families`, and the native LLaVA-Video."""

from __future__ import annotations

from typing import Any

import torch
from support.families import FAMILIES, SQUARE, TEXT, VIDEO, Family, Image, Video
from support.families import Row as Written
from torch import Tensor

from tokenreduce.models.llava_video.modeling import LlavaVideoConfig, LlavaVideoForConditionalGeneration


def llava_video_video(row: Written, video: Video) -> None:
    """Three rows of three patches and a newline per frame."""
    for frame in range(video.frames):
        row.vision(VIDEO, range(12), frame, (3, 7, 11))
    row.give(pixel_values_videos=row.noise(video.frames, 1, 3, 24, 24))


def no_image(row: Written, image: Image) -> None:
    raise AssertionError("these conversations have videos only")


def frames_one_by_one(rows: list[Written], ids: Tensor) -> dict[str, Tensor]:
    videos = [value for row in rows for value in row.pixels.get("pixel_values_videos", [])]
    return {"pixel_values_videos": torch.cat(videos)} if videos else {}


class LlavaVideo(Family):
    """The native model, which transformers does not have."""

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0, attn: str = "sdpa") -> Any:
        torch.manual_seed(seed)
        made = LlavaVideoForConditionalGeneration(self.config()).eval().to(dtype)
        made.set_attn_implementation(attn)
        made.generation_config.pad_token_id = 0
        return made


def llava_video_config() -> LlavaVideoConfig:
    return LlavaVideoConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **SQUARE},
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        initializer_range=0.1,
    )


SUBJECTS = {name: FAMILIES[name] for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")}
SUBJECTS["llava_video"] = LlavaVideo(
    "llava_video", "", llava_video_config, no_image, llava_video_video, frames_one_by_one
)
