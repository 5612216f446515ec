"""The needle task: numbered tiles drawn into real videos, and questions about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenreduce.compare.identity import content_hash
from tokenreduce.compare.tasks import Item, Task
from tokenreduce.errors import MediaError, TokenReduceError
from tokenreduce.testbed.clips import clip_paths
from tokenreduce.testbed.needle import NeedleSpec, NeedleTask

NEEDLE = "needle"
SHORT_ANSWER = 8
"""Tokens of an answer at most."""
SPREAD = ("count", "list")
"""Kinds of question that rest on all tiles, and so on no position."""


@dataclass(frozen=True)
class Needles(Task):
    """Needle in a video; examples take the conditions in turns."""

    spec: NeedleSpec
    """What all examples have in common."""
    frames: tuple[int, ...]
    """Lengths of the videos, in frames."""
    positions: tuple[float | None, ...]
    """Places of the decisive tile, 0 first frame … 1 last; None leaves them to chance."""
    seed: int
    """Of the stream of examples."""
    name = NEEDLE
    new_tokens = SHORT_ANSWER
    frame_times = False

    @cached_property
    def _streams(self) -> list[NeedleTask]:
        return [
            NeedleTask(replace(self.spec, frames=frames, position=position))
            for position in self.positions
            for frames in self.frames
        ]

    def item(self, index: int) -> Item:
        stream = self._streams[index % len(self._streams)]
        made = stream.example(self.seed, index)
        scored = made.scored
        cell: dict[str, float] = {"frames": len(made.frames)}
        if made.kind not in SPREAD:
            decisive = made.needles[scored.needs[-1]].frame
            where = stream.spec.position
            cell["position"] = decisive / max(len(made.frames) - 1, 1) if where is None else where
        turns = tuple((turn.text, turn.answer) for turn in made.turns)
        expected = " ".join(scored.expected)
        shown = tuple(sorted({made.needles[i].frame for turn in made.turns for i in turn.needs}))
        return Item(str(index), made.frames, turns, expected, scored.options, scored, cell, shown)

    def settings(self) -> dict[str, Any]:
        spec = {name: value for name, value in vars(self.spec).items() if name not in ("frames", "position")}
        named = self.spec.clips if isinstance(self.spec.clips, tuple) else clip_paths(self.spec.clips)
        clips = {str(clip): f"sha256 {content_hash(Path(clip))}" for clip in named}
        return {"task": NEEDLE, **spec, "clips": clips, "frames": [*self.frames], "positions": [*self.positions]}


def needles(
    *,
    kind: str,
    frames: Sequence[int],
    positions: int | None,
    size: int,
    placement: str,
    seed: int,
    clips: Sequence[str] = (),
    resolution: int | None = None,
    grid: int | None = None,
) -> Needles:
    """The needle task. positions: so many places from the first frame to the last, None: anywhere. clips: videos by path.

    resolution, grid: pixels and cells per side of a frame; by default those of the embedded model.
    """
    if positions is not None and positions < 2:
        raise TokenReduceError(f"--positions {positions}: at least 2 places, from the first frame to the last")
    missing = [clip for clip in clips if not Path(clip).is_file()]
    if missing:
        raise MediaError(f"{missing[0]}: no such video")
    spec = NeedleSpec(
        kind=kind,  # type: ignore[arg-type]
        placement=placement,  # type: ignore[arg-type]
        size=size,
        clips=tuple(clips) if clips else "heldout",
        resolution=resolution or NeedleSpec.resolution,
        grid=grid or NeedleSpec.grid,
    )
    places = (None,) if positions is None else tuple(i / (positions - 1) for i in range(positions))
    task = Needles(spec, tuple(frames), places, seed)
    for count in frames:  # What cannot be is refused before a model is loaded.
        replace(spec, frames=count)
    return task
