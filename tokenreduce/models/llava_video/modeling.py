"""LLaVA-Video (arXiv:2410.02713) on transformers' own SigLIP, projector and Qwen2.

A frame becomes a grid of tower features, pooled, with one learned newline after each row: 14 × 15 = 210 tokens per
frame in the released models. transformers' LLaVA-OneVision has the same parts but one newline after the whole video.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

PoolMode = Literal["bilinear", "average", "max"]


class LlavaVideoConfig(LlavaOnevisionConfig):  # type: ignore[misc]
    """Config of the native model.

    `video_token_id`, inherited, stands for one video token in input_ids; no text uses it.
    """

    model_type = "llava_video"

    pool_mode: PoolMode = "bilinear"
    """How the features of a frame are pooled."""
    pool_stride: int = 2
    """Patches per side of a pooled one; 1 leaves the features as they are."""
    context_length: int | None = 32768
    """Tokens the model was made for, which `prepare` refuses to exceed; None: no limit."""
    force_sample: bool = False
    """Whether to spread `max_frames` over every video, also over a short one."""

    @property
    def rows(self) -> int:
        """Rows of pooled patches in a frame, and patches in a row: frames are square."""
        grid: int = self.vision_config.image_size // self.vision_config.patch_size
        return math.ceil(grid / self.pool_stride) if self.pool_mode == "bilinear" else grid // self.pool_stride

    @property
    def tokens_per_frame(self) -> int:
        """Pooled patches and one newline per row."""
        return self.rows * (self.rows + 1)


class LlavaVideoModel(LlavaOnevisionModel):  # type: ignore[misc]
    """Tower, projector and decoder, with a newline after each row of a frame."""

    config_class = LlavaVideoConfig

    def pooled_grid(self, image_features: Tensor) -> Tensor:
        """(frames, patches, D) projected features to (frames, D, rows, rows)."""
        frames, patches, width = image_features.shape
        side, rows, stride = math.isqrt(patches), self.config.rows, self.config.pool_stride
        grid = image_features.transpose(1, 2).reshape(frames, width, side, side)
        if self.config.pool_mode == "bilinear":
            return F.interpolate(grid, size=(rows, rows), mode="bilinear")
        return F.avg_pool2d(grid, stride) if self.config.pool_mode == "average" else F.max_pool2d(grid, stride)

    def apply_pooling(self, image_features: Tensor) -> Tensor:
        """(frames, patches, D) projected features to (frames, rows · (rows + 1), D), newlines included."""
        grid = self.pooled_grid(image_features)
        frames, width, rows, _ = grid.shape
        newline = self.image_newline.to(grid)[:, None, None].expand(frames, width, rows, 1)
        return torch.cat((grid, newline), dim=-1).flatten(2).transpose(1, 2)

    def get_video_features(
        self,
        pixel_values_videos: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Features of (videos, frames, 3, H, W) pixels; `pooler_output` is (videos, frames · tokens_per_frame, D).

        Videos of one batch that differ in length go in as frames: (all frames, 1, 3, H, W), in the order of the
        placeholders. A single video may come as (frames, 3, H, W).
        """
        if pixel_values_videos.dim() == 4:
            pixel_values_videos = pixel_values_videos[None]
        outputs = super().get_video_features(
            pixel_values_videos,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            **{**kwargs, "return_dict": True},
        )
        # The last one is the newline that OneVision puts after the whole video.
        outputs.pooler_output = outputs.pooler_output[:, :-1].contiguous()
        return outputs


class LlavaVideoForConditionalGeneration(LlavaOnevisionForConditionalGeneration):  # type: ignore[misc]
    """LLaVA-Video as a Hugging Face model: `forward`, `generate`, `save_pretrained`, `from_pretrained`."""

    config_class = LlavaVideoConfig

    def __init__(self, config: LlavaVideoConfig) -> None:
        super(LlavaOnevisionForConditionalGeneration, self).__init__(config)
        self.model = LlavaVideoModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(LlavaVideoConfig.model_type, LlavaVideoConfig, exist_ok=True)
AutoModelForImageTextToText.register(LlavaVideoConfig, LlavaVideoForConditionalGeneration, exist_ok=True)
