"""LLaVA-1.5 and LLaVA-NeXT: images only, so every medium is one frame."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tokenreduce.adapter import Prompt, TowerCall, VisionTower
from tokenreduce_adapters._anyres import AnyresAdapter, tower_side
from tokenreduce_adapters._runs import (
    Kind,
    Medium,
    Places,
    VisionAdapter,
    image_places,
    placeholder,
    runs,
    settings,
    square_side,
)
from tokenreduce_adapters._towers import frames_signals, frames_tower, one_per_frame


class LlavaAdapter(VisionAdapter):
    """Every image is a medium of one frame, all its tokens are slots of their own, and there are no newlines.

    With a Pixtral tower an image is one run of ids per row with a break id between the rows: still one medium, whose
    breaks are marked as wrappers and, being text, stay.
    """

    name = "llava"
    model_types = ("llava",)
    checkpoints = ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf", "mistral-community/pixtral-12b")
    notes = "images only (576 tokens at 336 px): one frame per medium, so nothing merges across frames"
    kinds = ("image",)

    def lengths(self, model: nn.Module, prompt: Prompt, kind: Kind) -> list[int]:
        sizes = prompt.kwargs.get("image_sizes")
        if sizes is not None:
            patches = torch.as_tensor(sizes) // settings(model).vision_config.patch_size
            return [int(rows * columns) for rows, columns in patches.tolist()]
        images = len(prompt.kwargs["pixel_values"])
        total = int(torch.eq(prompt.input_ids, placeholder(model, kind)).sum())
        return [total // images] * images

    def places(self, model: nn.Module, prompt: Prompt, medium: Medium) -> Places:
        places = image_places(medium)
        sizes = prompt.kwargs.get("image_sizes")
        if sizes is not None:
            return places.in_rows_of(int(sizes[medium.index][1]) // settings(model).vision_config.patch_size)
        # Without its size (generate() takes it away), a Pixtral image still has a run of ids for each row.
        width = len(runs(medium.columns)[0])
        return places.in_rows_of(width if width < len(medium) else square_side(len(medium)))

    def tower_signals(self, model: nn.Module) -> Mapping[str, str]:
        return frames_signals(model)

    def tokens_of(self, model: nn.Module, kind: Kind, call: TowerCall) -> Tensor:
        return one_per_frame(call, tower_side(model.config) ** 2).values.flatten(0, 1)

    def vision_tower(self, model: nn.Module) -> VisionTower | None:
        return frames_tower(model)


class LlavaNextAdapter(AnyresAdapter):
    """Every image is a medium of one frame: an overview, then rows of its tiles, each ended by a newline."""

    name = "llava_next"
    model_types = ("llava_next",)
    checkpoints = (
        "llava-hf/llava-v1.6-mistral-7b-hf",
        "llava-hf/llava-v1.6-vicuna-7b-hf",
        "llava-hf/llava-v1.6-34b-hf",
    )
    notes = "images only, tiled, a newline per row: one frame per medium, so nothing merges across frames"
    kinds = ("image",)
