"""What is asked in a comparison: needles in videos, or somebody's videos and questions."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenreduce.errors import MediaError, TokenReduceError
from tokenreduce.testbed.needle import NeedleSpec, NeedleTask
from tokenreduce.testbed.questions import Question

NEEDLE = "needle"
LONG_ANSWER, SHORT_ANSWER = 32, 8
"""Tokens of an answer at most, for free text and for needles."""
SPREAD = ("count", "list")
"""Kinds of needle question that rest on all tiles, and so on no position."""


@dataclass(frozen=True)
class Item:
    """One example. video: frames (F, H, W, 3) uint8, or a file. turns: questions; the last one is scored.

    expected: the right answer in the form that `read` gives. question: reads replies in place of our own rules. cell: where
    the example lies in a grid of conditions. shown: frames that pictures of the example should have.
    """

    id: str
    video: NDArray[np.uint8] | Path
    turns: tuple[tuple[str, str], ...]
    expected: str
    options: tuple[str, ...] = ()
    question: Question | None = None
    cell: dict[str, float] = field(default_factory=dict)
    shown: tuple[int, ...] = ()

    def read(self, reply: str) -> str:
        """What a reply says; equal to `expected` if it is right."""
        if self.question is not None:
            return " ".join(self.question.read(reply))
        return read_choice(reply, self.options) if self.options else read_free(reply, self.expected)


class Task(ABC):
    """A source of examples; example `index` is always the same."""

    name: str
    new_tokens = LONG_ANSWER
    frame_times = True
    size: int | None = None
    """How many examples there are, None for any number."""

    @abstractmethod
    def item(self, index: int) -> Item:
        """Example `index`. Raises MediaError where its video cannot be read."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that decides what the examples are, as plain data."""


@dataclass(frozen=True)
class Needles(Task):
    """Needle in a video. frames, positions: conditions that examples take in turns; positions None leaves them to chance."""

    spec: NeedleSpec
    frames: tuple[int, ...]
    positions: tuple[float | None, ...]
    seed: int
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
        clips = [str(clip) for clip in self.spec.clips] if isinstance(self.spec.clips, tuple) else self.spec.clips
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


def open_task(name: str, seed: int, **options: Any) -> Task:
    """`needle`, a folder of videos with a questions file, or a data set saved by the `datasets` library.

    options: of `needles`, plus `questions`: path of a questions file.
    """
    questions = options.pop("questions", None)
    if name == NEEDLE:
        return needles(seed=seed, **options)
    from tokenreduce.compare.files import open_folder

    return open_folder(Path(name), seed, None if questions is None else Path(questions))


def prompt_with_options(question: str, options: Sequence[str]) -> str:
    """A multiple-choice question as VideoMME and its kin put it."""
    if not options:
        return question
    lines = [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options)]
    return "\n".join([question, *lines, "Answer with the option's letter from the given choices directly."])


def read_choice(reply: str, options: Sequence[str]) -> str:
    """The letter of the option that a reply names: a letter on its own, else an option's own words; "" for none."""
    letters = [chr(ord("A") + i) for i in range(len(options))]
    named = re.match(r"\W*(?:option|answer|the answer is)?\W*([A-Z])(?:\W|$)", reply.strip(), re.IGNORECASE)
    if named and named[1].upper() in letters:
        return named[1].upper()
    words = f" {normal(reply)} "
    found = [letter for letter, option in zip(letters, options, strict=True) if f" {normal(option)} " in words]
    return found[0] if len(found) == 1 else ""


def read_free(reply: str, expected: str) -> str:
    """`expected` where a reply contains its words in a row, else the reply's own words."""
    said = normal(reply)
    return expected if f" {expected} " in f" {said} " else said


def normal(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    words = re.findall(r"\w+", text.lower())
    return " ".join(word for word in words if word not in ("a", "an", "the"))
