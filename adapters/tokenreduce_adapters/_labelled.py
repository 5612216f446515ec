"""Families that write a video as one picture per frame, with the same ids as an image and a label before each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapter import Prompt
from tokenreduce.errors import LayoutError
from tokenreduce_adapters._runs import (
    Kind,
    Medium,
    Places,
    VisionAdapter,
    frame_places,
    image_places,
    placeholder,
    runs,
    square_side,
)

LABEL_LIMIT = 16
"""Tokens that the label of a frame ("Frame12: ", "Frame from 00:12:") may have at most."""


@dataclass(frozen=True)
class Picture:
    """An image or a frame: its columns (L,) in a row, where it starts and stops, whether it is `whole` (not tiled)."""

    columns: Tensor
    start: int
    stop: int
    whole: bool


class LabelledAdapter(VisionAdapter):
    """Base for InternVL and SmolVLM.

    Ids do not tell a frame from an image. So pictures of one tile are frames of one video as long as the label between
    them is short, ends with the token that the label before ended with, and does not begin another video. Pictures of
    several tiles are images. Single-tile images in a row, joined by the same text, are therefore read as frames; an
    explicit layout overrides that.
    """

    kinds = ("image",)

    def per_tile(self, config: Any) -> int:
        """Tokens of a tile, a frame, or an image that is not tiled."""
        raise NotImplementedError

    def pictures(self, ids: Sequence[int], parts: list[Tensor], per_tile: int) -> list[Picture]:
        """The pictures of a row, from its runs of image ids; by default every run is one."""
        return [Picture(p, int(p[0]), int(p[-1]) + 1, len(p) == per_tile) for p in parts]

    def restarts(self, first: list[int], second: list[int], label: list[int]) -> bool:
        """Whether `label` belongs to the first frame of another video.

        first: the ids before the first frame of this video, its label at the end. second: the label of the second.
        """
        return False

    def media(self, model: nn.Module, prompt: Prompt, kind: Kind) -> list[Medium]:
        found: list[Medium] = []
        per_tile = self.per_tile(model.config)
        spots = prompt.input_ids == placeholder(model, "image")
        for row in spots.any(1).nonzero().flatten().tolist():
            ids, parts = prompt.input_ids[row].tolist(), runs(spots[row].nonzero().flatten())
            wrong = next((len(part) for part in parts if len(part) % per_tile), None)
            if wrong is not None:
                raise LayoutError(f"{self.name}: a run of {wrong} image tokens, but a tile or frame has {per_tile}")
            for medium in self._videos(ids, self.pictures(ids, parts, per_tile)):
                columns = torch.cat([picture.columns for picture in medium])
                found.append(Medium("video" if medium[0].whole else "image", len(found), row, columns))
        return found

    def places(self, model: nn.Module, prompt: Prompt, medium: Medium) -> Places:
        per_tile = self.per_tile(model.config)
        # Tiles lie one below the other: their grid in the picture is not in the ids.
        places = image_places(medium) if medium.kind == "image" else frame_places(medium, per_tile, self.name)
        return places.in_rows_of(square_side(per_tile))

    def _videos(self, ids: list[int], pictures: list[Picture]) -> list[list[Picture]]:
        """Pictures that are frames of one video together, every other picture alone."""
        videos: list[list[Picture]] = []
        for picture in pictures:
            if videos and videos[-1][-1].whole and picture.whole and self._follows(ids, videos[-1], picture):
                videos[-1].append(picture)
            else:
                videos.append([picture])
        return videos

    def _follows(self, ids: list[int], video: list[Picture], picture: Picture) -> bool:
        """Whether the label before `picture` makes it the next frame of `video`."""
        label = self._between(ids, video[-1], picture)
        if not label or len(label) > LABEL_LIMIT:
            return not label
        second = self._between(ids, video[0], video[1]) if len(video) > 1 else label
        first, last = (ids[: frame.start - self.tags[0]][-LABEL_LIMIT:] for frame in (video[0], video[-1]))
        return last[-1:] == label[-1:] and not self.restarts(first, second, label)

    def _between(self, ids: list[int], left: Picture, right: Picture) -> list[int]:
        """The text between two pictures, without the tags around them."""
        return ids[left.stop + self.tags[1] : right.start - self.tags[0]]
