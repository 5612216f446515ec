"""Qwen2-VL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenreduce.adapter import Prompt, TowerCall, VisionTower
from tokenreduce.errors import LayoutError
from tokenreduce_adapters._runs import Kind, Medium, Places, VisionAdapter, image_places, settings


class Qwen2VLAdapter(VisionAdapter):
    """Media of any size, each between `<|vision_start|>` and `<|vision_end|>`; a frame is a temporal patch.

    Frames come from the grid of the video where the forward has it, otherwise (under generate(), which takes the grids
    away) from the rotary positions: a frame starts where height and width are back at their first values.
    """

    name = "qwen2_vl"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    checkpoints: ClassVar[tuple[str, ...]] = (
        "Qwen/Qwen2-VL-2B-Instruct",
        "Qwen/Qwen2-VL-7B-Instruct",
        "Qwen/Qwen2-VL-72B-Instruct",
    )
    notes = "frames of any size, read from the grids or from the (t, h, w) positions"
    tags = (1, 1)

    def lengths(self, model: nn.Module, prompt: Prompt, kind: Kind) -> list[int]:
        area = settings(model).vision_config.spatial_merge_size ** 2
        return [t * h * w // area for t, h, w in prompt.kwargs[f"{kind}_grid_thw"].tolist()]

    def places(self, model: nn.Module, prompt: Prompt, medium: Medium) -> Places:
        places = self.frames(prompt, medium)
        grids, positions = prompt.kwargs.get(f"{medium.kind}_grid_thw"), prompt.position_ids
        if grids is not None:
            side = settings(model).vision_config.spatial_merge_size
            return places.in_rows_of(int(grids[medium.index][2]) // side)
        if positions is None or positions.dim() != 3:
            return places
        place = positions[-2:, medium.row, medium.columns].to(places.frame.device)
        first = place.new_zeros(2, int(places.frame.max()) + 1)
        first = first.scatter_reduce_(1, places.frame.expand(2, -1), place, "amin", include_self=False)
        return replace(places, grid=place - first[:, places.frame])

    def frames(self, prompt: Prompt, medium: Medium) -> Places:
        """Slots and frames of one medium."""
        if medium.kind == "image":
            return image_places(medium)
        grids = prompt.kwargs.get("video_grid_thw")
        token = torch.arange(len(medium), device=medium.columns.device)
        if grids is not None:
            per_frame = len(medium) // int(grids[medium.index][0])
            return Places(token % per_frame, token // per_frame)
        start = self._frame_starts(prompt.position_ids, medium)
        frame = start.cumsum(0) - 1
        return Places(token - start.nonzero().flatten()[frame], frame)

    def vision_tower(self, model: nn.Module) -> VisionTower | None:
        tower: Any = getattr(model, "model", model).visual
        return VisionTower(
            module=tower,
            blocks=tower.blocks,
            patch=tower.config.patch_size,
            pixels="hidden_states",
            mask=None,
            grid="grid_thw",
            merged=tower.config.spatial_merge_size**2,
        )

    def tower_signals(self, model: nn.Module) -> Mapping[str, str]:
        why = "its vision tower has no class token"
        pooled = "its vision tower has no output of a whole frame"
        return {"tower.cls": why, "tower.mean": "", "tower.keys": "", "tower.pooled": pooled}

    def tokens_of(self, model: nn.Module, kind: Kind, call: TowerCall) -> Tensor:
        # The patches of a token stand side by side already.
        merged = settings(model).vision_config.spatial_merge_size ** 2
        return call.values.view(-1, merged, call.values.shape[-1]).mean(1)

    def _frame_starts(self, position_ids: Tensor | None, medium: Medium) -> Tensor:
        """(L,) bool: tokens at which a frame of the video begins."""
        if position_ids is not None and position_ids.dim() == 3:
            place = position_ids[-2:, medium.row, medium.columns]
            # Text positions grow along the whole video; a grid comes back, or has rows and columns that differ.
            if len(medium) == 1 or not bool((place.diff() == 1).all()):
                return (place == place[:, :1]).all(0)
        raise LayoutError(
            f"{self.name}: neither grids nor (t, h, w) positions in this forward say where the frames of a video of "
            f"{len(medium)} tokens begin; pass mm_token_type_ids and video_grid_thw, as the processor returns them"
        )
