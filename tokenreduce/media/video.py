"""Reading a video: which frames to show, and decoding those alone (PyAV)."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenreduce.config.json_source import exists, expanded
from tokenreduce.errors import MediaError

FPS, MAX_FRAMES = 1.0, 64
"""LLaVA-Video's sampling: frames per second, and frames at most."""
INDEXED = {"mp4", "matroska", "webm"}
"""Containers with true times and an index: AVI times are in decoding order; transport streams seek anywhere."""


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of its first video stream."""

    frames: int
    """How many there are."""
    fps: float
    """Average frames per second."""
    width: int
    """Pixels, before any rotation."""
    height: int
    """Pixels, before any rotation."""
    pts: tuple[int, ...] | None = None
    """Times of all frames, ascending, in the stream's time base; None where the container cannot be trusted with them."""
    key_pts: tuple[int, ...] | None = None
    """Times of the frames decoding can start at, ascending, in the same unit; None as for `pts`."""

    @property
    def duration(self) -> float:
        """Seconds: frames divided by frames per second."""
        return self.frames / self.fps


@dataclass(frozen=True)
class VideoClip:
    """Sampled frames."""

    frames: Sequence[NDArray[np.uint8]]
    """One uint8 RGB (H, W, 3) array per frame; sizes may differ."""
    times: list[float]
    """Seconds, one per frame."""
    duration: float
    """Seconds, of the whole video."""
    fps: float
    """Frames per second of the video."""
    indices: list[int]
    """Place of each frame in the video."""
    total: int | None = None
    """Frames of the video, if known."""

    @classmethod
    def of(cls, info: VideoInfo, indices: list[int], frames: Sequence[NDArray[np.uint8]]) -> VideoClip:
        """The clip made of `indices` of the video described by `info`."""
        times = [index / info.fps for index in indices]
        return cls(frames, times, info.duration, info.fps, indices, info.frames)

    def array(self) -> NDArray[np.uint8]:
        """(F, H, W, 3) uint8; MediaError where sizes differ."""
        sizes = {frame.shape for frame in self.frames}
        if len(sizes) > 1:
            raise MediaError(f"the frames differ in size ({sorted(sizes)}); this model needs frames of one size")
        return np.stack(list(self.frames))

    def images(self) -> list[Image.Image]:
        """The frames as PIL images."""
        return [Image.fromarray(frame) for frame in self.frames]


def sample_indices(
    total: int, avg_fps: float, fps: float = FPS, max_frames: int = MAX_FRAMES, force_sample: bool = False
) -> list[int]:
    """Which frames LLaVA-Video shows: every round(avg_fps / fps)-th; where those are too many, `max_frames` evenly.

    With `force_sample` always `max_frames` spread evenly; a shorter video then shows some frames more than once, as the
    authors' code does.
    """
    if total < 1:
        raise MediaError("the video has no frames")
    if not (fps > 0 and avg_fps > 0):
        raise MediaError(f"frames per second must be above 0, got fps={fps} for a video of {avg_fps}")
    if max_frames < 1:
        raise MediaError(f"max_frames must be at least 1, got {max_frames}")
    indices = list(range(0, total, max(1, round(min(avg_fps / fps, total)))))
    if len(indices) > max_frames or force_sample:
        return [int(index) for index in np.linspace(0, total - 1, max_frames, dtype=int)]
    return indices


def video_info(path: str | Path) -> VideoInfo:
    """Frames, rate and size of a file's first video stream. Reads the file through, decodes nothing.

    Raises:
        MediaError: no such file, a directory, not a video, no video stream, no frames, truncated.
    """
    with _Reader(path) as reader:
        stream = reader.stream
        packets = [packet for packet in reader.packets() if packet.size]
        shown = [packet for packet in packets if not packet.is_discard]
        if not shown:
            raise MediaError(f"{path}: the video has no frames")
        if "mp4" in reader.container.format.name and stream.frames > len(packets):
            raise MediaError(
                f"{path}: truncated, it should have {stream.frames} frames and holds {len(packets)}; copy it again"
            )
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise MediaError(f"{path}: the file states no frame rate; convert it to mp4")
        times = sorted({packet.pts for packet in shown if packet.pts is not None})
        timed = bool(INDEXED & set(reader.container.format.name.split(","))) and len(times) == len(shown)
        return VideoInfo(
            frames=len(shown),
            fps=float(rate),
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            pts=tuple(times) if timed else None,
            key_pts=tuple(sorted(packet.pts for packet in shown if packet.is_keyframe)) if timed else None,
        )


def decode_frames(
    path: str | Path,
    indices: Sequence[int],
    *,
    info: VideoInfo | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[NDArray[np.uint8]]:
    """Frames `indices` of a file as uint8 RGB (H, W, 3) arrays, turned upright; only these are kept in memory.

    Args:
        path: the file.
        indices: frames to read, 0 … frames − 1, in any order, repeats allowed.
        info: from `video_info`, if there already.
        progress: called with (frames read, frames wanted).

    Raises:
        MediaError: as `video_info`; also an index beyond the video, or a frame that cannot be decoded.
    """
    info = info or video_info(path)
    wanted = sorted(set(indices))
    if wanted and not 0 <= wanted[0] <= wanted[-1] < info.frames:
        outside = wanted[0] if wanted[0] < 0 else wanted[-1]
        raise MediaError(f"{path}: there is no frame {outside}; the video has frames 0 … {info.frames - 1}")
    found: dict[int, NDArray[np.uint8]] = {}
    for jump in (True, False):
        with _Reader(path) as reader:
            missing = [index for index in wanted if index not in found]
            for index, frame in reader.select(missing, info, jump):
                found[index] = _upright(frame)
                if progress is not None:
                    progress(len(found), len(wanted))
    if len(found) < len(wanted):
        lost = next(index for index in wanted if index not in found)
        raise MediaError(f"{path}: frame {lost} of {info.frames} cannot be decoded; the file is damaged or truncated")
    return [found[index] for index in indices]


def read_video(
    path: str | Path,
    fps: float = FPS,
    max_frames: int = MAX_FRAMES,
    force_sample: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> VideoClip:
    """Sample a file as `sample_indices` says and read those frames."""
    info = video_info(path)
    indices = sample_indices(info.frames, info.fps, fps, max_frames, force_sample)
    return VideoClip.of(info, indices, decode_frames(path, indices, info=info, progress=progress))


class _Reader:
    """An open file and its first video stream; errors of the decoder come out as one-line MediaErrors."""

    def __init__(self, path: str | Path) -> None:
        self.path = expanded(path, MediaError)

    def __enter__(self) -> _Reader:
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
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def packets(self) -> Iterator[av.Packet]:
        """All packets of the stream."""
        try:
            yield from self.container.demux(self.stream)
        except (av.error.FFmpegError, OSError) as error:
            raise MediaError(f"{self.path}: damaged or truncated ({error.strerror})") from None

    def frames(self) -> Iterator[av.VideoFrame]:
        """Frames from here to the end, in the order they are shown."""
        try:
            yield from self.container.decode(self.stream)
        except (av.error.FFmpegError, OSError) as error:
            raise MediaError(f"{self.path}: damaged or truncated ({error.strerror})") from None

    def select(self, wanted: Sequence[int], info: VideoInfo, jump: bool) -> Iterator[tuple[int, av.VideoFrame]]:
        """For each of the ascending `wanted`, the frame shown at its time.

        With `jump`, decoding skips to the last key frame before the target where that saves work; the generator ends
        early where a jump lands beyond its target.
        """
        times = range(info.frames) if info.pts is None else info.pts
        todo = [(times[index], index) for index in reversed(wanted)]
        start: int | None = None
        while todo:
            if jump and (start := _key_worth_a_jump(info, start, todo[-1][0])) is not None:
                self.container.seek(start, stream=self.stream)
            shown: av.VideoFrame | None = None
            for count, frame in enumerate(self.frames()):
                time = count if info.pts is None else frame.pts
                if time is None or (start is not None and time < start):
                    continue
                while todo and time >= todo[-1][0]:
                    target, index = todo.pop()
                    if time > target and shown is None:
                        return
                    yield index, frame if time == target else shown
                shown = frame
                if not todo or (jump and _key_worth_a_jump(info, time, todo[-1][0]) is not None):
                    start = time
                    break
            else:
                return


JUMP = 16
"""Frames that a jump must save; below, decoding on is faster than starting the decoder anew."""


def _key_worth_a_jump(info: VideoInfo, here: int | None, target: int) -> int | None:
    """Time of the last key frame up to `target`, if it lies more than JUMP frames after `here` (None: the start)."""
    if info.pts is None or not info.key_pts:
        return None
    place = bisect.bisect_right(info.key_pts, target)
    if not place:
        return None
    key = info.key_pts[place - 1]
    skipped = bisect.bisect_left(info.pts, key) - (0 if here is None else bisect.bisect_left(info.pts, here))
    return key if skipped > JUMP else None


def _upright(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """RGB (H, W, 3), with the rotation that the file asks for."""
    image: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image
