"""Tiles, the needles of the needle-in-a-video task: a coloured square that shows a digit or a spot of another colour."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "orange": (250, 140, 20),
    "yellow": (245, 225, 40),
    "green": (30, 160, 60),
    "cyan": (60, 215, 225),
    "blue": (40, 60, 220),
    "purple": (140, 40, 180),
    "white": (245, 245, 245),
}
"""Tile colours and their RGB values; the names are the keys that questions use."""

DIGITS = tuple("0123456789")

_ROWS = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00010 00100 01000 11111",
    "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "01110 10000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00001 01110",
)
_DARK = ("red", "green", "blue", "purple")
_SIDE = 8


def tile_image(colour: str, content: str, side: int) -> NDArray[np.uint8]:
    """(side, side, 3) uint8: a tile of `colour` that shows `content`, a digit or the name of a spot's colour."""
    image = np.empty((_SIDE, _SIDE, 3), dtype=np.uint8)
    image[:] = COLOURS[colour]
    if content in COLOURS:
        image[2:6, 2:6] = COLOURS[content]
    else:
        bits = np.array([[bit == "1" for bit in row] for row in _ROWS[int(content)].split()])
        image[1:8, 2:7][bits] = 255 if colour in _DARK else 0
    nearest = np.arange(side) * _SIDE // side
    return image[nearest][:, nearest]
