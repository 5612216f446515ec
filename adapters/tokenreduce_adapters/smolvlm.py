"""SmolVLM2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenreduce_adapters._labelled import LabelledAdapter, Picture


class SmolVLMAdapter(LabelledAdapter):
    """A frame is one run of ids after its time, between `<fake_token_around_image><global-img>` and another fake token.

    A tiled image is a run per tile, each after a fake token and its own `<row_r_col_c>`, and at last the global view:
    one medium of frame 0. Images that are not tiled, with equal text between them, are read as frames, see
    `LabelledAdapter`. All tags and times are text, and stay.
    """

    name = "smolvlm"
    model_types = ("smolvlm",)
    checkpoints = (
        "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
        "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    )
    notes = "one tagged run per frame; a tiled image is one medium; untiled images in a row are read as a video"
    tags = (2, 1)

    def per_tile(self, config: Any) -> int:
        vision = config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2)

    def pictures(self, ids: Sequence[int], parts: list[Tensor], per_tile: int) -> list[Picture]:
        images: list[list[Tensor]] = []
        for part in parts:
            if images and _next_tile(ids, images[-1][-1], part):
                images[-1].append(part)
            else:
                images.append([part])
        return [
            Picture(torch.cat(tiles), int(tiles[0][0]), int(tiles[-1][-1]) + 1, whole=sum(map(len, tiles)) == per_tile)
            for tiles in images
        ]


def _next_tile(ids: Sequence[int], tile: Tensor, part: Tensor) -> bool:
    """Whether `part` is the next tile of the image of `tile`: a fake token and another tag, at most line breaks before.

    After the global view comes a closing fake token first.
    """
    start, gap = int(tile[0]), ids[int(tile[-1]) + 1 : int(part[0])]
    if start < 2 or not 2 <= len(gap) <= 4:
        return False
    fake, tag = ids[start - 2], ids[start - 1]
    return gap[-2] == fake and gap[-1] != tag and (len(gap) == 2 or gap[0] != fake)
