"""What became of each patch of an example, as strips of frames: one for the input and one per arm."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenreduce.adapter import Prompt
from tokenreduce.compare.measure import ArmOutcome, Bench
from tokenreduce.compare.tasks import Item
from tokenreduce.errors import MediaError
from tokenreduce.media.pictures import frame_grid, patch_positions, patch_states, render_frame
from tokenreduce.models import look

FRAMES, SIDE, GAP = 8, 144, 4
"""Frames in a strip at most, pixels of the longer side of one, and between two."""
Pixels = NDArray[np.uint8]


def picture(bench: Bench, item: Item, index: int, outcomes: Mapping[str, ArmOutcome]) -> dict[str, Any] | None:
    """Strips of one example as plain data; None where frames and tokens do not form one grid.

    The data: model, index, question, expected, frames (their numbers), strips: a list of {arm, reply, right, kept, merged,
    dropped, png}, the first being the input; png is base64.
    """
    inputs = bench.prepare(item)
    prompt = Prompt.read(inputs["input_ids"], inputs)
    layout = bench.adapter.layout(bench.model, prompt)
    frames = _frames(bench, item)
    if layout is None or frames is None:
        return None
    grid = frame_grid(layout, frames.shape[1] / frames.shape[2])
    if grid is None:
        return None
    slot, frame = layout.slot[0].cpu().numpy(), layout.frame[0].cpu().numpy()
    positions = patch_positions(slot, frame, grid, None if layout.marker is None else layout.marker[0].cpu().numpy())
    if len(positions) != len(frames):
        return None
    chosen = _chosen(len(frames), item.shown)
    shown = np.stack([_resized(frames[i], grid) for i in chosen])
    strips: list[dict[str, Any]] = [{"arm": "input", "png": _strip(shown)}]
    for arm in bench.arms:
        outcome = outcomes[arm.name]
        states = patch_states(outcome.counts.source.numpy(), positions)
        counts = [int((states == state).sum()) for state in range(3)]
        reply = bench.speaker.text([token for token in outcome.reply.ids if token not in bench.speaker.ends])
        strips.append(
            {
                "arm": arm.name,
                "reply": reply,
                "right": outcome.reply.finite and item.read(reply) == item.expected,
                **dict(zip(("kept", "merged", "dropped"), counts, strict=True)),
                "png": _strip(np.stack([render_frame(f, states[i]) for f, i in zip(shown, chosen, strict=True)])),
            }
        )
    question = " … ".join(text for text, _ in item.turns)
    data = {"model": bench.name, "index": index, "id": item.id, "question": question, "expected": item.expected}
    return {**data, "frames": chosen, "strips": strips}


def _frames(bench: Bench, item: Item) -> Pixels | None:
    """The frames that the model saw, as far as they can be known."""
    if not isinstance(item.video, Path):
        return item.video
    try:
        return look(bench.model, item.video, **bench.options()).array()
    except (MediaError, ValueError):
        return None


def _chosen(count: int, wanted: tuple[int, ...]) -> list[int]:
    """`wanted` frames and others at even distances, FRAMES in all if there are so many, in order of time."""
    chosen = set(wanted[:FRAMES])
    for i in np.linspace(0, count - 1, max(count, 1)).round().astype(int)[:: max(1, count // FRAMES)]:
        if len(chosen) < FRAMES:
            chosen.add(int(i))
    return sorted(chosen)


def _resized(frame: Pixels, grid: tuple[int, int]) -> Pixels:
    """The frame about SIDE pixels long, with sides that the grid divides."""
    height, width = frame.shape[:2]
    scale = SIDE / max(height, width)
    rows, columns = grid
    size = (max(1, round(width * scale / columns)) * columns, max(1, round(height * scale / rows)) * rows)
    way = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(frame).resize(size, way))


def _strip(frames: Pixels) -> str:
    """Frames (F, H, W, 3) side by side as a PNG, base64."""
    count, height, width, _ = frames.shape
    sheet = np.full((height, count * (width + GAP) - GAP, 3), 255, dtype=np.uint8)
    for i, frame in enumerate(frames):
        sheet[:, i * (width + GAP) : i * (width + GAP) + width] = frame
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")
