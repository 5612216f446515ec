"""An open video file: packets, frames, and jumps to those that are wanted (PyAV)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import av
import numpy as np
from numpy.typing import NDArray

from tokenreduce.config.json_source import exists, expanded
from tokenreduce.errors import MediaError

JUMP = 16
"""Frames that a jump must save; below, decoding on is faster than starting the decoder anew."""


def local_path(path: str | Path) -> Path:
    """The path itself, or that of a `file://` URL. Raises MediaError for any other URL."""
    text = str(path)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text)
    if scheme is None or exists(text):
        return expanded(path, MediaError)
    if scheme[1].lower() != "file":
        raise MediaError(f"{text}: a URL; download it first, and give the file")
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise MediaError(f"{text}: a file on another machine ({parts.netloc}); copy it here first, and give the file")
    return Path(url2pathname(unquote(parts.path)))


class Reader:
    """An open file and its first video stream; errors of the decoder come out as one-line MediaErrors.

    path: the file. container, stream: PyAV's. formats: names of its container's format. size: (width, height) in pixels of the
    first frame, before any rotation. lenient: whether frames end, without an error, where the decoder cannot go on.
    """

    def __init__(self, path: Path, lenient: bool = False) -> None:
        self.path, self.lenient = path, lenient

    def __enter__(self) -> Reader:
        if exists(self.path) and self.path.is_dir():
            raise MediaError(f"{self.path}: a directory; give a video file")
        if not exists(self.path):
            raise MediaError(f"{self.path}: no such file")
        if not self.path.is_file():
            raise MediaError(f"{self.path}: is not a regular file; give a video file")
        try:
            self.container = av.open(str(self.path))
        except (av.error.FFmpegError, OSError) as error:
            reason = error.strerror or type(error).__name__
            raise MediaError(f"{self.path}: not a readable video ({reason}); truncated, or another format") from None
        cover = av.stream.Disposition.attached_pic
        streams = [s for s in self.container.streams.video if not s.disposition & cover]
        if not streams:
            self.container.close()
            raise MediaError(f"{self.path}: no video stream in it (sound only?)")
        self.stream = streams[0]
        self.stream.thread_type = "AUTO"
        self.formats = set(self.container.format.name.split(","))
        self.size = (self.stream.codec_context.width, self.stream.codec_context.height)
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def packets(self) -> Iterator[av.Packet]:
        """All packets of the stream that hold something."""
        try:
            for packet in self.container.demux(self.stream):
                if packet.size:
                    yield packet
        except (av.error.FFmpegError, OSError) as error:
            if not self.lenient:
                raise MediaError(f"{self.path}: damaged or truncated ({error.strerror})") from None

    def frames(self) -> Iterator[av.VideoFrame]:
        """Frames from here to the end, in the order they are shown."""
        try:
            yield from self.container.decode(self.stream)
        except (av.error.FFmpegError, OSError) as error:
            if not self.lenient:
                raise MediaError(f"{self.path}: damaged or truncated ({error.strerror})") from None

    def select(self, wanted: Sequence[int], index: Index | None, jump: bool) -> Iterator[tuple[int, av.VideoFrame]]:
        """For each of the ascending `wanted`, the frame shown at its time; without an index, the frame of that number.

        With `jump`, decoding skips to the last key frame before the target where that saves work; the generator ends
        early where a jump lands beyond its target.
        """
        todo = [(number if index is None else int(index.pts[number]), number) for number in reversed(wanted)]
        start: int | None = None
        while todo:
            if jump and index is not None and (start := index.jump(start, todo[-1][0])) is not None:
                self.container.seek(start, stream=self.stream)
            shown: av.VideoFrame | None = None
            for count, frame in enumerate(self.frames()):
                time = count if index is None else frame.pts
                if time is None or (start is not None and time < start):
                    continue
                while todo and time >= todo[-1][0]:
                    target, number = todo.pop()
                    if time > target and shown is None:
                        return
                    yield number, frame if time == target else shown
                shown = frame
                if not todo or (jump and index is not None and index.jump(time, todo[-1][0]) is not None):
                    start = time
                    break
            else:
                return

    def upright(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        """RGB (H, W, 3), of the first frame's size where that changes on the way, with the rotation that the file asks for."""
        turns = round(frame.rotation / 90) % 4
        if (frame.width, frame.height) != self.size and all(self.size):
            frame = frame.reformat(*self.size)
        image: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
        return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


class Index:
    """When frames are shown and where decoding can start, in the stream's time base; ascending.

    pts: (F,) int64, of all frames. keys: (K,) int64, of the key frames.
    """

    def __init__(self, pts: NDArray[np.int64], keys: NDArray[np.int64]) -> None:
        self.pts, self.keys = pts, keys

    def jump(self, here: int | None, target: int) -> int | None:
        """Time of the last key frame up to `target`, if it lies more than JUMP frames after `here` (None: the start)."""
        place = int(self.keys.searchsorted(target, side="right"))
        if not place:
            return None
        key = int(self.keys[place - 1])
        skipped = self.pts.searchsorted(key) - (0 if here is None else self.pts.searchsorted(here))
        return key if skipped > JUMP else None
