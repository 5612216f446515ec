"""Images of the LLaVA-NeXT kind: an overview, then a grid of tiles, its padding cut off, a newline after each row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapter import Prompt, TowerCall, VisionTower
from tokenreduce.errors import UnsupportedError
from tokenreduce_adapters._runs import Kind, Medium, Places, VisionAdapter, encoded_features, image_places
from tokenreduce_adapters._towers import frames_signals, frames_tower, one_per_frame


def tower_side(config: Any) -> int:
    """Patches along one side of the vision tower's square input."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)


class AnyresAdapter(VisionAdapter):
    """The image half of LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision."""

    def vision_tower(self, model: nn.Module) -> VisionTower | None:
        return frames_tower(model)

    def tower_signals(self, model: nn.Module) -> Mapping[str, str]:
        return frames_signals(model)

    def tokens_of(self, model: nn.Module, kind: Kind, call: TowerCall) -> Tensor:
        if kind == "image":
            raise UnsupportedError(
                f"{self.name}: signals of the vision tower are not carried to images in tiles, whose patches overlap in tokens"
            )
        return self.pooled_frames(model, one_per_frame(call, tower_side(model.config) ** 2).values.float()).flatten(
            0, 1
        )

    def pooled_frames(self, model: nn.Module, frames: Tensor) -> Tensor:
        """(F, tokens, C): patches (F, n, C) of the frames of a video, pooled as their features are."""
        raise UnsupportedError(f"{self.name}: this family has no videos")

    def tile_limit(self, config: Any) -> int | None:
        """Tiles above which the grid is scaled down, or None where the family never does that."""
        return None

    def grid(self, config: Any, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the tiled part of an image of `size` (height, width) pixels, without newlines."""
        # Costs seconds, which commands that only list plugins need not spend.
        from transformers.image_processing_utils import select_best_resolution

        side, pixels = tower_side(config), config.vision_config.image_size
        best_height, best_width = select_best_resolution(size, config.image_grid_pinpoints)
        rows, columns = best_height // pixels * side, best_width // pixels * side
        height, width = size
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        limit = self.tile_limit(config)
        ratio = math.sqrt(rows * columns / (limit * side**2)) if limit else 1.0
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

    def image_newlines(self, model: nn.Module, prompt: Prompt) -> list[Tensor]:
        """Per image, (L,) bool: where the newlines are, from the sizes of the images."""
        config: Any = model.config
        sizes = torch.as_tensor(prompt.kwargs["image_sizes"]).tolist()
        counts = prompt.kwargs.get("batch_num_images")
        # Several images in one sample are not tiled (OneVision): an overview and one newline each.
        tiled = [True] * len(sizes) if counts is None else [n == 1 for n in map(int, counts) for _ in range(n)]
        return [self._newlines(config, size if tile else None) for size, tile in zip(sizes, tiled, strict=True)]

    def _newlines(self, config: Any, size: list[int] | None) -> Tensor:
        overview = torch.zeros(tower_side(config) ** 2, dtype=torch.bool)
        rows, columns = (1, 0) if size is None else self.grid(config, (size[0], size[1]))
        row = torch.arange(columns + 1) == columns
        return torch.cat([overview, row.repeat(rows)])

    def lengths(self, model: nn.Module, prompt: Prompt, kind: Kind) -> list[int]:
        return [len(newline) for newline in self.image_newlines(model, prompt)]

    def places(self, model: nn.Module, prompt: Prompt, medium: Medium) -> Places:
        encoded = encoded_features(prompt, "image")
        if encoded is None:
            newline = self.image_newlines(model, prompt)[medium.index].to(medium.columns.device)
            return _in_grids(image_places(medium, newline), tower_side(model.config))
        # generate() takes the sizes away; the learned newline is in the features as it is, bit for bit.
        features = encoded[medium.index]
        learned: Any = getattr(model, "model", model).image_newline
        newline = (features == learned.to(features)).all(-1).to(medium.columns.device)
        return _in_grids(image_places(medium, newline), tower_side(model.config))


def _in_grids(places: Places, side: int) -> Places:
    """An image with its rows and columns: an overview of side × side, and below it the rows that newlines end."""
    newline, slot = places.newline, places.slot
    assert newline is not None
    behind = slot >= side**2
    row = torch.where(behind, side + newline.cumsum(0) - newline.long(), slot // side)
    starts = torch.cat([slot[:1] + side**2, newline.nonzero().squeeze(1) + 1])
    column = torch.where(behind, slot - starts[(row - side).clamp(min=0)], slot % side)
    return replace(places, grid=torch.where(newline, -1, torch.stack([row, column])))
