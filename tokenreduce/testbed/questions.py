"""The questions of the needle-in-a-video task, and what makes an answer right.

one_hop      the digit on the tile of a given colour.
second_turn  one_hop twice about different tiles; the second answer counts, on what the first question left of the cache.
chain        colour of a spot on one tile, then the digit on the tile of that colour: which tile matters is not known before
             the first word of the answer has been said (late importance).
two_hop      the same, answered with the digit alone.
spot         the colour of a spot (the first hop alone).
count        how many tiles carry a digit. order: which of two tiles comes first.
list         every tile and its digit, in order of appearance.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from tokenreduce.testbed.glyphs import COLOURS, DIGITS

Kind = Literal["one_hop", "second_turn", "chain", "two_hop", "spot", "count", "order", "list"]
KINDS: tuple[Kind, ...] = get_args(Kind)


EXAMPLE = "Which digit is on the red tile?"
"""A question that the embedded model can read."""
_COLOUR = f"({'|'.join(COLOURS)})"
_READ = re.compile(
    rf"which digit is on the {_COLOUR} tile\?|which colou?r is the spot on the {_COLOUR} tile"
    r"(\?|, and which digit is on the tile of that colou?r\?)"
)


def is_read(question: str) -> bool:
    """Whether the embedded model was trained on such a question: the digit on a tile, a spot's colour, or one after the other."""
    return _READ.fullmatch(" ".join(question.lower().split())) is not None


@dataclass(frozen=True)
class Tile:
    """A needle."""

    colour: str
    """Of the tile, a name of `glyphs.COLOURS`."""
    content: str
    """A digit, or the colour of a spot."""
    frame: int = -1
    """Frame it is in; −1 before it has a place."""
    row: int = -1
    """Cell row of its upper left corner; −1 before it has a place."""
    column: int = -1
    """Cell column of that corner; −1 before it has a place."""
    inserted: bool = False
    """Whether its frame is a card of its own rather than a frame of the clip."""


@dataclass(frozen=True)
class Question:
    """One turn."""

    text: str
    """The question."""
    answer: str
    """The right answer, in words."""
    options: tuple[str, ...]
    """What the words of the answer that count may be."""
    needs: tuple[int, ...]
    """Indices of the tiles that the answer rests on."""

    @property
    def expected(self) -> tuple[str, ...]:
        """The words of the answer that count: those among `options`."""
        return tuple(word for word in self.answer.split() if word in self.options)

    def read(self, reply: str) -> tuple[str, ...]:
        """The last options that a reply names, at most as many as are expected."""
        named = tuple(word for word in re.findall(r"\w+", reply.lower()) if word in self.options)
        return named[-len(self.expected) :]

    def accepts(self, reply: str) -> bool:
        """Whether a reply gives the right answer."""
        return self.read(reply) == self.expected


def pick(kind: Kind, tiles: Sequence[Tile], rng: np.random.Generator) -> list[tuple[int, ...]]:
    """For each turn of `kind`, the tiles it rests on (indices); the last of the last turn decides the answer."""
    digits = [i for i, tile in enumerate(tiles) if tile.content in DIGITS]
    spots = [i for i, tile in enumerate(tiles) if tile.content in COLOURS]
    if kind in ("count", "list"):
        return [tuple(digits)]
    if kind in ("chain", "two_hop", "spot"):
        pointer = int(rng.choice(spots))
        target = next(i for i, tile in enumerate(tiles) if tile.colour == tiles[pointer].content)
        return [(pointer,) if kind == "spot" else (pointer, target)]
    if kind == "order":
        first, second = rng.choice(digits, 2, replace=False)
        return [(int(first), int(second))]
    asked = rng.choice(digits, 2 if kind == "second_turn" else 1, replace=False)
    return [(int(i),) for i in asked]


def phrase(kind: Kind, tiles: Sequence[Tile], needs: tuple[int, ...]) -> Question:
    """The question of one turn about placed `tiles`, and its answer."""
    tile, last = tiles[needs[0]], tiles[needs[-1]]
    colours = tuple(COLOURS)
    if kind == "count":
        return Question("How many tiles carry a digit?", str(len(needs)), DIGITS, needs)
    if kind == "list":
        shown = sorted((tiles[i] for i in needs), key=_appearance)
        text = "List the tiles and their digits in order of appearance."
        return Question(text, " ".join(f"{t.colour} {t.content}" for t in shown), DIGITS, needs)
    if kind == "spot":
        return Question(f"Which colour is the spot on the {tile.colour} tile?", tile.content, colours, needs)
    if kind == "order":
        earlier = min(tile, last, key=_appearance)
        text = f"Which tile comes first, {tile.colour} or {last.colour}?"
        return Question(text, earlier.colour, (tile.colour, last.colour), needs)
    if kind == "chain":
        text = f"Which colour is the spot on the {tile.colour} tile, and which digit is on the tile of that colour?"
        return Question(text, f"{tile.content} {last.content}", DIGITS, needs)
    if kind == "two_hop":
        text = f"Which digit is on the tile of the colour that the spot on the {tile.colour} tile has?"
        return Question(text, last.content, DIGITS, needs)
    return Question(f"Which digit is on the {tile.colour} tile?", tile.content, DIGITS, needs)


def _appearance(tile: Tile) -> tuple[int, int, int]:
    return tile.frame, tile.row, tile.column
