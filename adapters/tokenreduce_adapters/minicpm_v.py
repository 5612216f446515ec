"""MiniCPM-V 2.6: a frame is an overview of 64 queries and its slices of 64 queries each, every one between two tags.

The released FrameFusion counts tokens from the first query of the first frame to the newline behind the last frame,
tags included; a frame then runs from its first query to the first query of the next. This layout gives the same
numbers, and marks tags, newlines and image numbers as wrappers: a pipeline says `wrappers: merge` (as released) or
`protect`.

Frames and pictures follow one another as one medium as long as only a newline, or a newline and an image number, stands
between them: the ids do not tell a video from several images in a row. Other text between them begins a new medium.

Where frames of one medium are cut into different grids, all overviews share their slots (query q sees the whole picture
in every frame), and slices share slots only with frames of the same grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.adapter import ModelAdapter, Prompt
from tokenreduce.layout import PLAIN, WRAPPER, TokenLayout


@dataclass(frozen=True)
class _Frame:
    """starts: place of the first query of each picture, overview first. close: place of the last closing tag."""

    starts: tuple[int, ...]
    close: int

    @property
    def structure(self) -> tuple[int, ...]:
        """Equal for frames of the same grid: where their pictures begin."""
        return tuple(start - self.starts[0] for start in self.starts)


class MiniCPMVAdapter(ModelAdapter):
    """Layout of MiniCPM-V 2.6, read from the token ids."""

    name = "minicpm_v"
    model_types = ("minicpmv2_6",)
    checkpoints = ("openbmb/MiniCPM-V-2_6",)
    notes = "64 tokens per overview and slice; tags around them are wrappers; consecutive images count as one video"

    def layout(self, model: nn.Module, prompt: Prompt) -> TokenLayout:
        """Frames, slots and wrappers of each row; text only where no whole picture is in the ids (decode steps)."""
        ids = prompt.input_ids
        config: Any = model.config
        batch, tokens = ids.shape
        if tokens < config.query_num + 2:
            return TokenLayout.text(batch, tokens).to(ids.device)
        queries = model.picture_places(ids).cpu()  # type: ignore[operator]
        rows = [_row_layout(row, plain, config) for row, plain in zip(ids.cpu(), queries, strict=True)]
        slot, frame, medium = (torch.stack(parts) for parts in zip(*rows, strict=True))
        marker = torch.where((slot >= 0) & ~queries, WRAPPER, PLAIN)
        return TokenLayout(slot=slot, frame=frame, medium=medium, marker=marker).to(ids.device)


def _row_layout(ids: Tensor, queries: Tensor, config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Slot, frame and medium (N,) of one row; `queries` (N,) bool marks the tokens that pictures fill."""
    slot = torch.full_like(ids, -1)
    frame, medium = slot.clone(), slot.clone()
    for number, frames in enumerate(_media(ids, queries, config)):
        ends = [following.starts[0] for following in frames[1:]] + [_end(ids, frames[-1].close, config)]
        shift = _shifts(frames, ends, config.query_num + 1)
        for index, (part, end) in enumerate(zip(frames, ends, strict=True)):
            start = part.starts[0]
            offset = torch.arange(end - start)
            slot[start:end] = torch.where(offset > config.query_num, offset + shift[part.structure], offset)
            frame[start:end] = index
            medium[start:end] = number
    return slot, frame, medium


def _media(ids: Tensor, queries: Tensor, config: Any) -> list[list[_Frame]]:
    """The frames of each medium, in the order of the ids."""
    media: list[list[_Frame]] = []
    starts = (queries & ~queries.roll(1)).nonzero().flatten().tolist()
    for start in starts:
        frame = _Frame((start,), start + config.query_num)
        before = media[-1][-1] if media else None
        between = ids[before.close + 1 : start - 1].tolist() if before else []
        slice_ = int(ids[start - 1]) == config.slice_start_token_id
        if before and slice_ and between in ([], [config.newline_token_id]):
            media[-1][-1] = _Frame((*before.starts, start), frame.close)
        elif before and not slice_ and _separates_frames(between, config):
            media[-1].append(frame)
        else:
            media.append([frame])
    return media


def _separates_frames(between: list[int], config: Any) -> bool:
    """Whether `between` is what stands between two frames: a newline, and the next frame's number if it has one."""
    if between[:1] == [config.newline_token_id]:
        between = between[1:]
    if not between:
        return True
    tags = config.image_id_start_token_id, config.image_id_end_token_id
    return (between[0], between[-1]) == tags and not set(between[1:-1]) & set(tags)


def _end(ids: Tensor, close: int, config: Any) -> int:
    """Where the last frame of a medium ends: behind its closing tag and the newline that may follow."""
    follows = close + 1 < len(ids) and int(ids[close + 1]) == config.newline_token_id
    return close + 2 if follows else close + 1


def _shifts(frames: list[_Frame], ends: list[int], shared: int) -> dict[tuple[int, ...], int]:
    """For each structure, what is added to offsets ≥ `shared` so that no two structures have such a slot in common."""
    lengths: dict[tuple[int, ...], int] = {}
    for part, end in zip(frames, ends, strict=True):
        lengths[part.structure] = max(lengths.get(part.structure, shared), end - part.starts[0])
    shift, total = {}, 0
    for structure, length in lengths.items():
        shift[structure] = total
        total += length - shared
    return shift
