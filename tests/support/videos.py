"""Videos whose frames say which they are: frame i is grey, of brightness TONE · i (mod 256)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

TONE = 10


def write_timed(
    path: Path, codec: str, times: Sequence[int], size: tuple[int, int] = (64, 48), hold_ms: int = 0, **options: str
) -> Path:
    """A file with a frame at each of `times`, in milliseconds. hold_ms: how long the last one is shown, where not as usual."""
    unit = 10 if codec == "gif" else 1
    muxing = {name: options.pop(name) for name in ("movflags",) if name in options}
    with av.open(str(path), "w", options=muxing) as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(unit, 1000)
        packets = []
        for number, time in enumerate(times):
            picture = np.full((size[1], size[0], 3), TONE * number % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time // unit, Fraction(unit, 1000)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        if hold_ms:
            packets[-1].duration = hold_ms // unit
        container.mux(packets)
    return path


def tone_of(frame: NDArray[np.uint8]) -> int:
    """Its brightness."""
    return round(float(frame.mean()))
