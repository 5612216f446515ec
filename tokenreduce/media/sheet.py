"""A white page with a heading, a grid of equal pictures with captions, and a legend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

MARGIN, GAP, CAPTION, HEADER, LEGEND = 16, 12, 20, 62, 36
INK, PALE, RULE = (25, 25, 25), (95, 95, 95), (205, 205, 205)
LEAST_WIDTH = 560


class Sheet:
    """An empty page of `rows` × `columns` cells, each `cell` = (height, width) pixels, and `side` pixels left of them.

    Pictures are pasted pixel for pixel.
    """

    def __init__(self, cell: tuple[int, int], rows: int, columns: int, side: int = 0) -> None:
        self.cell, self.side = cell, side
        width = 2 * MARGIN + side + columns * (cell[1] + GAP) - GAP
        height = HEADER + rows * (cell[0] + CAPTION + GAP) + LEGEND
        self.page = Image.new("RGB", (max(width, LEAST_WIDTH), height), "white")
        self.draw = ImageDraw.Draw(self.page)

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """(x, y) of the top left pixel of a cell."""
        x = MARGIN + self.side + column * (self.cell[1] + GAP)
        return x, HEADER + row * (self.cell[0] + CAPTION + GAP)

    def place(self, picture: NDArray[np.uint8], caption: str, row: int, column: int) -> None:
        """Put `picture` (H, W, 3) into a cell, with `caption` under it."""
        x, y = self.corner(row, column)
        self.draw.rectangle((x - 1, y - 1, x + self.cell[1], y + self.cell[0]), outline=RULE)
        self.page.paste(Image.fromarray(picture), (x, y))
        self.draw.text((x, y + self.cell[0] + 3), caption, PALE, _font(12))

    def name(self, row: int, name: str, below: str) -> None:
        """Write `name`, cut where it is too long, and smaller lines below it, beside a row."""
        y, font = self.corner(row, 0)[1], _font(14, bold=True)
        fitting = len(name)
        while fitting > 1 and font.getlength(name[:fitting]) > self.side - GAP:
            fitting -= 1
        self.draw.text((MARGIN, y), name if fitting == len(name) else f"{name[: fitting - 1]}…", INK, font)
        self.draw.multiline_text((MARGIN, y + 22), below, PALE, _font(12), spacing=5)

    def save(
        self, path: str | Path, title: str, below: str, legend: Sequence[tuple[tuple[int, int, int] | None, str]]
    ) -> Path:
        """Write heading, legend (colours, None for an empty box, and what they mean) and file; returns `path`."""
        self.draw.text((MARGIN, 12), title, INK, _font(17, bold=True))
        self.draw.text((MARGIN, 35), below, PALE, _font(13))
        x, y = MARGIN, self.page.height - LEGEND + 8
        for colour, label in legend:
            self.draw.rectangle((x, y, x + 15, y + 15), colour, outline=PALE)
            self.draw.text((x + 22, y), label, INK, _font(12))
            x += 46 + round(_font(12).getlength(label))
        self.page.save(path)
        return Path(path)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """A font that matplotlib ships, so that a page looks the same everywhere."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(folder / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"), size)
