"""Frames on their way into and out of a vision tower: taken out before it, put back behind it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tokenreduce.adapter import Prompt, VisionTower
from tokenreduce.engine.model.host import Host
from tokenreduce.errors import TokenReduceError, UnsupportedError
from tokenreduce.layout import TokenLayout
from tokenreduce.reduction import Reduction


class Frames:
    """The frames of one call of a tower."""

    axes = 4
    """Of the pixels."""
    pixels: Tensor
    """(F, C, H, W)."""
    total: int
    """Frames that come, F."""
    count: int
    """Frames that the tower encodes."""
    source: Tensor | None
    """(F,) long, which of the encoded frames each frame takes its features from; None as long as all are encoded."""

    def __init__(self, tower: VisionTower, family: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tower, self.family, self.args, self.kwargs = tower, family, args, kwargs
        pixels = args[0] if args else kwargs.get(tower.pixels)
        if not isinstance(pixels, Tensor) or pixels.dim() != self.axes:
            raise UnsupportedError(f"{family}: its vision tower was called without {tower.pixels} of {self.axes} axes")
        self.pixels = pixels
        self.total = self.count = len(pixels)
        self.source = None

    @property
    def groups(self) -> list[Tensor]:
        """The frames whose patches can be compared, each (F, n, P): pixels by patch.

        Pixels beyond the last whole patch are left out, as a tower leaves them.
        """
        frames, channels, height, width = self.pixels.shape
        side = self.tower.patch
        rows, columns = height // side, width // side
        whole = self.pixels[..., : rows * side, : columns * side]
        cut = whole.reshape(frames, channels, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
        return [cut.reshape(frames, rows * columns, -1)]

    def reduce(self, reductions: list[Reduction]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The tower's arguments without the frames that others stand for. reductions: of (1, F) frames, of one video each."""
        starts, begin = [], 0
        for reduction in reductions:
            starts.append(reduction.target + begin)
            begin += reduction.target.shape[1]
        kept, self.source = _kept(Reduction(torch.cat(starts, 1)))
        self.count = len(kept)
        return self._with(self.pixels[kept])

    def _with(self, pixels: Tensor, **more: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.args:
            return (pixels, *self.args[1:]), {**self.kwargs, **more}
        return self.args, {**self.kwargs, self.tower.pixels: pixels, **more}

    def restore(self, x: Tensor) -> Tensor:
        """`x` with all frames, where its first axis is the encoded ones."""
        if self.source is None or x.dim() < 2 or len(x) != self.count:
            return x
        return x.index_select(0, self.source.to(x.device))

    def has_all_frames(self, x: Tensor) -> bool:
        """Whether `x` has one entry in its first axis for each frame."""
        return len(x) == self.total


class PackedFrames(Frames):
    """Media of any size, their patches (patches, P) one after the other, and `grid` (media, 3): frames, rows, columns of each."""

    axes = 2

    def __init__(self, tower: VisionTower, family: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(tower, family, args, kwargs)
        name = tower.grid or ""
        grid = kwargs.get(name, args[1] if len(args) > 1 else None)
        beside = [key for key, value in kwargs.items() if isinstance(value, Tensor) and key not in (name, tower.pixels)]
        if not isinstance(grid, Tensor) or beside:
            what = f"{beside[0]}, which cannot follow the frames" if beside else f"no {name}"
            raise UnsupportedError(f"{family}: its vision tower was called with {what}")
        self.grid = grid
        self.shapes = [(int(t), int(h) * int(w)) for t, h, w in grid.tolist()]

    @property
    def groups(self) -> list[Tensor]:
        """One medium each: its frames are alike in size."""
        parts = self.pixels.split([frames * area for frames, area in self.shapes])
        return [part.reshape(frames, area, -1) for part, (frames, area) in zip(parts, self.shapes, strict=True)]

    def reduce(self, reductions: list[Reduction]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As for Frames; a medium keeps its first frame in any case."""
        parts, rows, grid, before = [], [], self.grid.clone(), 0
        for place, (group, reduction) in enumerate(zip(self.groups, reductions, strict=True)):
            kept, source = _kept(reduction)
            area = group.shape[1]
            parts.append(group[kept].flatten(0, 1))
            cells = torch.arange(area // self.tower.merged, device=source.device)
            rows.append((before + source[:, None] * len(cells) + cells).flatten())
            before += len(kept) * len(cells)
            grid[place, 0] = len(kept)
        self.source, self.count = torch.cat(rows), before
        pixels = torch.cat(parts)
        if len(self.args) > 1:
            return (pixels, grid, *self.args[2:]), self.kwargs
        return self._with(pixels, **{str(self.tower.grid): grid})

    def restore(self, x: Tensor) -> Tensor:
        """`x` with all frames, whether its first axis is patches or rows of `merged` patches."""
        merged = self.tower.merged
        if self.source is None or x.dim() < 2:
            return x
        if len(x) == self.count * merged and merged > 1:
            return x.reshape(-1, merged, *x.shape[1:]).index_select(0, self.source.to(x.device)).flatten(0, 1)
        return super().restore(x)

    def has_all_frames(self, x: Tensor) -> bool:
        """Whether `x` has one row per patch, or per `merged` patches."""
        return len(x) in (self.total, self.total // self.tower.merged)


def _kept(reduction: Reduction) -> tuple[Tensor, Tensor]:
    """Frames to encode (F',) long, and for each frame (F,) long which of them it takes its features from."""
    target = reduction.target[0]
    kept = reduction.kept[0]
    return kept.nonzero().squeeze(1), (kept.cumsum(0) - 1)[target]


def frames_of_call(tower: VisionTower, family: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Frames:
    """The frames that a tower is called with."""
    return (Frames if tower.grid is None else PackedFrames)(tower, family, args, dict(kwargs))


def pixels_of(kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The pixels that a model is called with, a tensor for its images and one for its videos."""
    return [x for name, x in kwargs.items() if name.startswith("pixel_") and isinstance(x, Tensor)]


def video_lengths(total: int, ids: Tensor | None, kwargs: Mapping[str, Any], host: Host) -> list[int] | None:
    """How many of the `total` frames of a tower's call belong together, in order; None where nothing tells.

    Frames of one video do, and images of one row next to each other: so a family without videos is shown frames.
    ids, kwargs: what the model is called with, pixels among it.
    """
    pixels = pixels_of(kwargs)
    layout = _layout(ids, kwargs, host) if len(pixels) == 1 else None
    lengths = [] if layout is None else _by_layout(layout)
    if sum(lengths) == total:
        return lengths
    shapes = {(x.shape[0], x.shape[1]) for x in pixels if x.dim() == 5 and x.shape[1] > 1}
    fitting = [(videos, frames) for videos, frames in shapes if videos * frames == total]
    if len(fitting) == 1:
        videos, frames = fitting[0]
        return [frames] * videos
    rows = kwargs.get("inputs_embeds") if ids is None else ids
    return [total] if rows is None or len(rows) == 1 else None


def _layout(ids: Tensor | None, kwargs: Mapping[str, Any], host: Host) -> TokenLayout | None:
    """Where the adapter finds the media; None where it does not: the forward that follows will say so."""
    try:
        return None if ids is None else host.adapter.layout(host.model, Prompt.read(ids, dict(kwargs)))
    except TokenReduceError:
        return None


def _by_layout(layout: TokenLayout) -> list[int]:
    """See `video_lengths`."""
    media, lengths = layout.media(), []
    for medium, frame, vision in zip(media, layout.frame, layout.vision, strict=True):
        places = torch.stack([medium, frame])[:, vision].unique_consecutive(dim=1)
        counts = Counter(number for number, _ in dict.fromkeys(map(tuple, places.T.tolist())))
        for several, group in itertools.groupby(counts.values(), lambda count: count > 1):
            some = list(group)
            lengths += some if several else [sum(some)]
    return lengths


def map_tensors(output: Any, change: Any) -> Any:
    """`output` with `change` applied to each tensor in it."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, Mapping):  # A ModelOutput is one, and its constructor takes its fields.
        return type(output)(**{key: map_tensors(value, change) for key, value in output.items()})
    if isinstance(output, (tuple, list)):
        return type(output)(map_tensors(value, change) for value in output)
    return output


def tensors(output: Any) -> list[Tensor]:
    """The tensors of an output, its main one first."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [x for value in values for x in tensors(value)]
