"""The order in which the decoder learns: one frame before many, finding a tile before talking about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lab.training.lessons import Batch, Writer, converse, time_instruction, varied
from tokenreduce.testbed.needle import Example, NeedleSpec, NeedleTask
from tokenreduce.testbed.questions import Kind

CORE: tuple[Kind, ...] = ("one_hop", "spot", "chain")
"""Kinds whose accuracy decides when a stage ends."""
DRILL = "drill"


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum.

    frames: length of the videos. batch: videos per step. steps: at most so many. rate: learning rate. kinds: how often each
    kind is asked, as weights; none means drills only. tiles, pointers: fewest and most per video. drills: share of drill
    batches. timed: share of batches whose prompt gives the times of the frames. until: running accuracy on the core kinds
    (or the drill) that ends the stage; None runs all steps, and lets the rate fall to a tenth (cosine).
    """

    name: str
    frames: int
    batch: int
    steps: int
    rate: float
    kinds: Mapping[Kind, float] = field(default_factory=dict)
    tiles: tuple[int, int] = (4, 4)
    pointers: tuple[int, int] = (2, 2)
    drills: float = 0.2
    timed: float = 0.0
    until: float | None = 0.93
    turns: int = 4

    def gates(self) -> tuple[str, ...]:
        """What must be mastered before the next stage."""
        return tuple(kind for kind in CORE if kind in self.kinds) or (DRILL,)


_CORE: dict[Kind, float] = {"one_hop": 3, "spot": 1.5, "chain": 1.5}
_ALL: dict[Kind, float] = {"one_hop": 3, "spot": 1, "chain": 2, "list": 0.5, "two_hop": 1, "order": 0.7, "count": 0.7}
_TILES, _POINTERS = (3, 5), (1, 2)

CURRICULUM: tuple[Stage, ...] = (
    Stage("drill", 1, 24, 1000, 1e-3, drills=1.0, until=0.85),
    Stage("frames-1", 1, 24, 1000, 1e-3, _CORE),
    Stage("frames-2", 2, 24, 600, 1e-3, _CORE, _TILES, _POINTERS),
    Stage("frames-4", 4, 20, 600, 1e-3, _ALL, _TILES, _POINTERS, timed=0.1),
    Stage("frames-8", 8, 14, 600, 7e-4, _ALL, _TILES, _POINTERS, timed=0.1),
    Stage("frames-16", 16, 10, 600, 5e-4, _CORE, _TILES, _POINTERS, timed=0.1, until=0.97),
    Stage("frames-32", 32, 6, 80, 5e-4, _CORE, _TILES, _POINTERS, timed=0.1, until=None),
)


def lesson(stage: Stage, writer: Writer, seed: int, step: int) -> tuple[Batch, tuple[str, ...]]:
    """The batch of one step and what its turns ask; always the same for the same seed and step."""
    rng = np.random.default_rng([seed, step])
    tiles, pointers = (int(rng.integers(low, high + 1)) for low, high in (stage.tiles, stage.pointers))
    spec = NeedleSpec(frames=stage.frames, tiles=tiles, pointers=pointers, clips="train", augment=True)
    rows = range(step * stage.batch, (step + 1) * stage.batch)
    if rng.random() < stage.drills:
        return writer.drill([NeedleTask(spec).example(seed, row) for row in rows], rng), (DRILL,)
    weights = np.array(list(stage.kinds.values()), dtype=float)
    kinds = [list(stage.kinds)[i] for i in rng.choice(len(weights), stage.turns, p=weights / weights.sum())]
    examples: list[Example] = [varied(spec, seed, row) for row in rows]
    talks = [converse(example, kinds, rng) for example in examples]
    times = time_instruction(stage.frames) if rng.random() < stage.timed else ""
    return writer.batch(examples, talks, times), tuple(kinds)
