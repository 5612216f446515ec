"""Needle in a video: tiles hidden in real clips and questions that pick one (after VideoNIAH and VNBench).

Examples are made on the fly and depend on the specification, the seed and the index alone. The tiles sit on a grid of
`grid` × `grid` cells, one cell being the area of one vision token, so that a needle can be as small as a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tokenreduce.errors import TokenReduceError, nearest
from tokenreduce.testbed.clips import Haystack, Split, haystack
from tokenreduce.testbed.glyphs import COLOURS, DIGITS, tile_image
from tokenreduce.testbed.questions import KINDS, Kind, Question, Tile, phrase, pick

Placement = Literal["edit", "insert", "mixed"]
_CARD = (96, 160)


@dataclass(frozen=True)
class NeedleSpec:
    """What the examples of a task look like."""

    kind: Kind = "one_hop"
    """What is asked, see `tokenreduce.testbed.questions`."""
    frames: int = 16
    """Length of the video, in frames."""
    placement: Placement = "edit"
    """`edit` draws a tile over a frame of the clip, `insert` gives it a grey frame of its own, `mixed` tosses a coin."""
    size: int = 1
    """Side of a tile, in cells."""
    grid: int = 6
    """Cells per side of a frame."""
    resolution: int = 48
    """Pixels per side of a frame."""
    tiles: int = 4
    """How many tiles carry a digit."""
    pointers: int | None = None
    """How many carry a spot of another tile's colour; None: what `kind` needs."""
    position: float | None = None
    """Where the tile that decides the answer is, 0 first frame … 1 last; None: anywhere."""
    clips: Split | tuple[Path | str, ...] = "heldout"
    """`heldout`, `train`, or videos by path."""
    augment: bool = False
    """Whether the clips are varied, see `Haystack`; for training only."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TokenReduceError(f"needle kind '{self.kind}' is unknown{nearest(self.kind, KINDS)}")
        if self.placement not in get_args(Placement):
            raise TokenReduceError(
                f"needle placement '{self.placement}' is unknown{nearest(self.placement, get_args(Placement))}"
            )
        if self.frames < 1 or not 1 <= self.size <= self.grid or self.resolution < self.grid:
            raise TokenReduceError(
                f"a needle video needs frames ≥ 1, 1 ≤ size ≤ grid and resolution ≥ grid, got frames {self.frames}, "
                f"size {self.size}, grid {self.grid}, resolution {self.resolution}"
            )
        least = 2 if self.kind in ("second_turn", "order") else 1
        if not least <= self.tiles or self.tiles + self.spots > len(COLOURS):
            raise TokenReduceError(
                f"{self.kind} needs at least {least} tiles, and tiles and pointers together at most {len(COLOURS)}; "
                f"got {self.tiles} and {self.spots}"
            )
        if self.position is not None and not 0 <= self.position <= 1:
            raise TokenReduceError(f"needle position must lie in 0 … 1, got {self.position}")

    @property
    def spots(self) -> int:
        """Number of pointer tiles."""
        needed = min(2, self.tiles) if self.kind in ("chain", "two_hop", "spot") else 0
        return needed if self.pointers is None else max(self.pointers, min(1, needed))


@dataclass(frozen=True)
class Example:
    """A video and what is asked about it."""

    frames: NDArray[np.uint8]
    """(F, H, W, 3) uint8 RGB."""
    turns: tuple[Question, ...]
    """The questions, one per turn; the answer to the last is scored."""
    needles: tuple[Tile, ...]
    """Every tile and where it is."""
    kind: Kind
    """The task's."""

    @property
    def question(self) -> str:
        """Text of the first question."""
        return self.turns[0].text

    @property
    def answer(self) -> str:
        """Answer to the first question."""
        return self.turns[0].answer

    @property
    def options(self) -> tuple[str, ...]:
        """What the first answer may be."""
        return self.turns[0].options

    @property
    def second(self) -> Question | None:
        """The second turn, if there is one."""
        return self.turns[1] if len(self.turns) > 1 else None

    @property
    def scored(self) -> Question:
        """The question whose answer counts: the last turn."""
        return self.turns[-1]


@dataclass(frozen=True)
class NeedleTask:
    """A stream of examples; example (seed, index) is always the same."""

    spec: NeedleSpec = NeedleSpec()
    """What the examples look like."""

    @cached_property
    def _haystack(self) -> Haystack:
        clips = self.spec.clips
        return haystack(clips if isinstance(clips, str) else list(clips), self.spec.resolution, self.spec.augment)

    def example(self, seed: int, index: int) -> Example:
        """Example `index` of the stream `seed`. Raises MediaError where the clips cannot be had."""
        rng = np.random.default_rng([seed, index])
        tiles = self._tiles(rng)
        needs = pick(self.spec.kind, tiles, rng)
        tiles = place(tiles, needs[-1][-1], self.spec, rng)
        turns = tuple(phrase(self.spec.kind, tiles, turn) for turn in needs)
        return Example(self._video(rng, tiles), turns, tiles, self.spec.kind)

    def _tiles(self, rng: np.random.Generator) -> tuple[Tile, ...]:
        """Tiles with colours and digits of their own, nowhere yet; pointers come last."""
        spec = self.spec
        colours = [str(c) for c in rng.permutation(list(COLOURS))][: spec.tiles + spec.spots]
        digits = [str(d) for d in rng.permutation(DIGITS)][: spec.tiles]
        order = rng.permutation(spec.tiles)
        targets = [colours[int(order[i % spec.tiles])] for i in range(spec.spots)]
        return tuple(Tile(colour, content) for colour, content in zip(colours, digits + targets, strict=True))

    def _video(self, rng: np.random.Generator, tiles: Sequence[Tile]) -> NDArray[np.uint8]:
        spec = self.spec
        own = sorted({tile.frame for tile in tiles if tile.inserted})
        video = np.empty((spec.frames, spec.resolution, spec.resolution, 3), dtype=np.uint8)
        clip = [frame for frame in range(spec.frames) if frame not in own]
        if clip:
            video[clip] = self._haystack.cut(rng, len(clip))
        for frame in own:
            video[frame] = rng.integers(*_CARD)
        for tile in tiles:
            draw(video[tile.frame], tile, spec.size, spec.grid)
        return video


def draw(frame: NDArray[np.uint8], tile: Tile, size: int, grid: int) -> None:
    """Draw `tile`, `size` × `size` cells of a `grid` × `grid` raster, into `frame` (H, W, 3) uint8."""
    height, width = frame.shape[:2]
    top, left = round(tile.row * height / grid), round(tile.column * width / grid)
    bottom, right = round((tile.row + size) * height / grid), round((tile.column + size) * width / grid)
    image = tile_image(tile.colour, tile.content, max(bottom - top, right - left))
    frame[top:bottom, left:right] = image[: bottom - top, : right - left]


def place(tiles: Sequence[Tile], decisive: int, spec: NeedleSpec, rng: np.random.Generator) -> tuple[Tile, ...]:
    """Give each tile a frame and a cell: frames of their own while there are enough, never overlapping."""
    frames = list(rng.permutation(spec.frames))
    if spec.position is not None:
        wanted = round(spec.position * (spec.frames - 1))
        frames.remove(wanted)
        frames.insert(min(decisive, spec.frames - 1), wanted)
    taken: set[tuple[int, int, int]] = set()
    cards: dict[int, bool] = {}
    out = []
    for number, tile in enumerate(tiles):
        frame = int(frames[number % spec.frames])
        if spec.position is not None and number == decisive:
            frame = wanted
        tossed = spec.placement == "insert" or (spec.placement == "mixed" and bool(rng.integers(2)))
        inserted = cards.setdefault(frame, tossed)
        row, column = _free_cell(frame, taken, spec, rng)
        taken.update((frame, row + i, column + j) for i in range(spec.size) for j in range(spec.size))
        out.append(Tile(tile.colour, tile.content, frame, row, column, inserted))
    return tuple(out)


def _free_cell(
    frame: int, taken: set[tuple[int, int, int]], spec: NeedleSpec, rng: np.random.Generator
) -> tuple[int, int]:
    reach, span = range(spec.size), spec.grid - spec.size + 1
    for cell in rng.permutation(span * span):
        row, column = divmod(int(cell), span)
        if not any((frame, row + i, column + j) in taken for i in reach for j in reach):
            return row, column
    raise TokenReduceError(
        f"{spec.tiles + spec.spots} tiles of {spec.size}×{spec.size} cells do not fit {spec.frames} frames of "
        f"{spec.grid}×{spec.grid}; ask for fewer or smaller tiles or more frames"
    )
