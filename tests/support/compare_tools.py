"""A clip and a folder for tests of comparisons: made here, so that nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np

FAST = ["--frames", "4", "--seed", "1", "--pictures", "1"]


def write_clip(path: Path, frames: int = 24, side: int = 64) -> Path:
    """A still background with a bright square that moves, as a video file."""
    background = np.random.default_rng(5).integers(60, 120, (side, side, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            frame = background.copy()
            frame[8:24, (number * 2) % 48 : (number * 2) % 48 + 12] = 230
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of results.jsonl."""
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json."""
    loaded: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return loaded
