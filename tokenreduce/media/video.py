"""Reading a video: which frames to show, and decoding those alone (PyAV). docs/media.md says what is read, and how."""

from __future__ import annotations

import math
import warnings
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenreduce.errors import MediaError
from tokenreduce.media.promised import promised_bytes
from tokenreduce.media.reader import Index, Reader, local_path
from tokenreduce.media.stills import is_webp, read_webp, webp_frames

FPS, MAX_FRAMES = 1.0, 64
"""LLaVA-Video's sampling: frames per second, and frames at most."""
TICKS = 10_000
"""Per second: the even grid that sampling by time counts in, where a rule of a model's authors counts frames."""
INDEXED = {"mp4", "matroska", "webm"}
"""Containers in which one can seek exactly: AVI times are in decoding order; transport streams seek anywhere."""
Rule = Callable[[int, float, float, int, bool], list[int]]
"""A sampling rule that counts frames: (total, their rate, fps, max_frames, force_sample) to ascending numbers of frames."""
Progress = Callable[[int, int], None]
"""Called with (frames decoded, frames wanted)."""


@dataclass(frozen=True, eq=False)
class VideoInfo:
    """What a file holds in its first video stream."""

    times: NDArray[np.float64]
    """(F,) seconds from the first frame, ascending: when each frame is shown."""
    duration: float
    """Seconds, from the first frame until the last one is no longer shown."""
    fps: float
    """Frames per second: those of a constant rate, else the average."""
    width: int
    """Pixels, of the first frame, before any rotation."""
    height: int
    """Pixels, of the first frame, before any rotation."""
    index: Index | None = None
    """For seeking; None where the container cannot be trusted with it, and frames are counted from the start."""
    missing: str = ""
    """What a truncated file lacks, in words; empty for a whole one."""

    @property
    def frames(self) -> int:
        """How many there are."""
        return len(self.times)

    @cached_property
    def constant(self) -> bool:
        """Whether no frame is shown more than half a frame away from where an even rate would put it."""
        if self.frames < 3:
            return True
        period = self.times[-1] / (self.frames - 1)
        return bool(np.abs(self.times - period * np.arange(self.frames)).max() <= period / 2)

    def pick(
        self,
        rule: Rule,
        fps: float | None = None,
        max_frames: int | None = None,
        force: bool = False,
        *,
        count: bool = False,
    ) -> list[int]:
        """Numbers of the frames that `rule` shows, ascending.

        The rule counts an even grid of TICKS per second and is given the frame on screen at each; a frame that would be
        shown twice is shown once, unless `force` asks for a number of frames. With `count` it counts the frames
        themselves, as its authors do, where the video has a constant rate.

        Raises:
            MediaError: `fps` is not above 0, or `max_frames` is not at least 1.
        """
        check_sampling(fps, max_frames)
        fps, most = FPS if fps is None else fps, MAX_FRAMES if max_frames is None else max_frames
        if count and self.constant:
            return rule(self.frames, self.fps, fps, most, force)
        ticks = rule(max(1, math.ceil(self.duration * TICKS)), float(TICKS), fps, most, force)
        shown = self.times.searchsorted(np.array(ticks) / TICKS + 1e-6, side="right") - 1
        return [int(i) for i in (shown if force else np.unique(shown))]


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
    info: VideoInfo | None = None
    """Of the file they came from, if one did."""

    @classmethod
    def of(cls, info: VideoInfo, indices: list[int], frames: Sequence[NDArray[np.uint8]]) -> VideoClip:
        """The clip made of `indices` of the video described by `info`."""
        return cls(frames, info.times[indices].tolist(), info.duration, info.fps, indices, info.frames, info)

    def array(self) -> NDArray[np.uint8]:
        """(F, H, W, 3) uint8; MediaError where sizes differ."""
        sizes = {frame.shape for frame in self.frames}
        if len(sizes) > 1:
            raise MediaError(f"the frames differ in size ({sorted(sizes)}); this model needs frames of one size")
        return np.stack(list(self.frames))

    def images(self) -> list[Image.Image]:
        """The frames as PIL images."""
        return [Image.fromarray(frame) for frame in self.frames]


def check_sampling(fps: Any, max_frames: Any) -> None:
    """MediaError where `fps` is not a number above 0 or `max_frames` not a whole number from 1 on; None is left out."""
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < math.inf):
        raise MediaError(f"fps must be a number above 0, got {fps!r}")
    if max_frames is not None and (
        isinstance(max_frames, bool) or not isinstance(max_frames, int | np.integer) or max_frames < 1
    ):
        raise MediaError(f"max_frames must be a whole number, at least 1, got {max_frames!r}")


def sample_indices(
    total: int, avg_fps: float, fps: float = FPS, max_frames: int = MAX_FRAMES, force_sample: bool = False
) -> list[int]:
    """Which frames LLaVA-Video shows: every round(avg_fps / fps)-th; where those are too many, `max_frames` evenly.

    With `force_sample` always `max_frames` spread evenly; a shorter video then shows some frames more than once, as the
    authors' code does.
    """
    if total < 1:
        raise MediaError("the video has no frames")
    check_sampling(fps, max_frames)
    if not avg_fps > 0:
        raise MediaError(f"frames per second must be above 0, got a video of {avg_fps}")
    indices = range(0, total, max(1, round(min(avg_fps / fps, total))))
    if len(indices) > max_frames or force_sample:
        return [int(index) for index in np.linspace(0, total - 1, max_frames, dtype=int)]
    return list(indices)


def video_info(path: str | Path, *, allow_truncated: bool = False) -> VideoInfo:
    """Frames, their times and the rate of a file's first video stream. Reads the file through, decodes nothing.

    Memory grows by some bytes per frame, never with the size of the file.

    Args:
        path: the file, or its file:// URL.
        allow_truncated: go on with what is there of a file that broke off, and warn of what is missing.

    Raises:
        MediaError: no such file, a URL, a directory, not a video, no video stream, no frames, truncated.
    """
    file = local_path(path)
    if is_webp(file):
        _refuse_truncated(file, False, 0, 0, 0.0, 0.0)
        starts, duration, (width, height) = webp_frames(file)
        return VideoInfo(np.array(starts), duration, len(starts) / duration, width, height)
    with Reader(file, lenient=allow_truncated) as reader:
        seen = _Seen(reader)
        if not seen.shown:
            _refuse_truncated(file, allow_truncated, 0, 0, 0.0, 0.0)
            raise MediaError(f"{path}: the video has no frames")
        times, rate = seen.times(), float(reader.stream.average_rate or reader.stream.guessed_rate or 0)
        if times is None:
            if not rate:
                raise MediaError(f"{path}: the file states neither times nor a frame rate; convert it to mp4")
            times = np.arange(seen.shown) / rate
        expected = reader.stream.frames if "mp4" in reader.formats else 0
        stated = reader.container.duration
        ends = float(times[-1]) + (seen.last_duration or (1 / rate if rate else 0.0))
        missing = _refuse_truncated(file, allow_truncated, expected, seen.whole, ends, stated / 1e6 if stated else 0.0)
        duration = ends if missing else _duration(reader, times, seen, rate)
        return VideoInfo(
            times=times,
            duration=duration,
            fps=_rate(times, duration, rate),
            width=reader.size[0],
            height=reader.size[1],
            index=seen.index(),
            missing=missing,
        )


class _Seen:
    """What the packets of a stream say, read one by one: none is kept.

    shown: packets with a frame to show. whole: packets that are not broken off. last_duration: seconds that the last frame is
    shown, 0 where no packet says so.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader, self.base = reader, float(reader.stream.time_base)
        self.shown = self.whole = 0
        self.last_duration = 0.0
        self._pts, self._dts, self._keys = array("q"), array("q"), array("q")
        self._spliced = False
        exact = bool(INDEXED & reader.formats)
        shift, before, step, last = 0, None, 0, None
        for packet in reader.packets():
            if packet.is_corrupt and exact:  # Its end is missing; transport streams say so of any that follows a gap.
                continue
            self.whole += 1
            pts, dts = packet.pts, packet.dts
            if not exact and dts is not None:
                # Files joined by `cat` start anew in the middle; a later part goes on where the earlier one ended.
                if before is not None and (before - dts - shift) * self.base > 1:
                    shift, self._spliced = before + step - dts, True
                if before is not None and dts + shift > before:
                    step = dts + shift - before
                before = dts + shift
            if packet.is_discard:
                continue
            self.shown += 1
            if dts is not None:
                self._dts.append(dts + shift)
            if pts is not None:
                self._pts.append(pts + shift)
                if packet.is_keyframe:
                    self._keys.append(pts)
                if last is None or pts + shift >= last:
                    last, self.last_duration = pts + shift, (packet.duration or 0) * self.base

    def _stamps(self) -> NDArray[np.int64] | None:
        for stamps in (self._pts, self._dts):
            if len(stamps) == self.shown:
                return np.sort(np.frombuffer(stamps, dtype=np.int64))
        return None

    def times(self) -> NDArray[np.float64] | None:
        """(F,) seconds from the first frame; None where the packets have no times."""
        stamps = self._stamps()
        if stamps is None or (len(stamps) > 1 and stamps[0] == stamps[-1]):
            return None
        numerator, denominator = self.reader.stream.time_base.as_integer_ratio()
        return np.asarray((stamps - stamps[0]) * numerator / denominator, dtype=np.float64)

    def index(self) -> Index | None:
        """For seeking, where the container allows it and no two frames have one time."""
        if not INDEXED & self.reader.formats or len(self._pts) < self.shown or not self._keys:
            return None
        pts = np.sort(np.frombuffer(self._pts, dtype=np.int64))
        return Index(pts, np.sort(np.frombuffer(self._keys, dtype=np.int64))) if (np.diff(pts) > 0).all() else None

    @property
    def spliced(self) -> bool:
        """Whether the times began anew somewhere."""
        return self._spliced


def _rate(times: NDArray[np.float64], duration: float, stated: float) -> float:
    """Frames per second: what the file states if that is so, else what the times say."""
    measured = (len(times) - 1) / times[-1] if len(times) > 1 else 0.0
    if stated and (not measured or abs(stated - measured) <= 0.01 * measured):
        return stated
    return len(times) / duration


def _duration(reader: Reader, times: NDArray[np.float64], seen: _Seen, rate: float) -> float:
    """Seconds until the last frame is no longer shown, from the packets, and from the headers where packets do not say."""
    stream, container, last = reader.stream, reader.container, float(times[-1])
    ends = [last + seen.last_duration] if seen.last_duration else []
    matroska = "matroska" in reader.formats
    if (matroska or not ends) and not seen.spliced:
        # In MP4 the stated duration is that of the whole medium, whatever its edit list shows of it.
        stated = [_clock(stream.metadata.get("DURATION", ""))]
        stated += [float(stream.duration * stream.time_base)] if stream.duration else []
        stated += [container.duration / 1e6] if container.duration and len(container.streams) == 1 else []
        start = float((stream.start_time or 0) * stream.time_base) if matroska else 0.0
        ends += [value - start for value in stated if value - start > last]
    if ends:
        return max(ends)
    return last + (last / (len(times) - 1) if len(times) > 1 else 1 / rate if rate else 1 / FPS)


def _clock(text: str) -> float:
    """Seconds of `HH:MM:SS.fraction`, 0 where it is something else."""
    try:
        hours, minutes, seconds = text.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        return 0.0


def _refuse_truncated(file: Path, allowed: bool, expected: int, there: int, ends: float, stated: float) -> str:
    """What is missing of a truncated file, in words, after a warning; MediaError unless that is `allowed`.

    expected, there: frames, where the header counts them. ends, stated: seconds, up to the last frame that is there, and in
    the header; 0 where it says nothing.
    """
    promised, size = promised_bytes(file), file.stat().st_size
    if promised is not None and promised <= size:
        return ""
    if promised is None and not (stated and ends and _breaks_off(file, stated - ends, stated)):
        return ""
    parts = [f"it should have {expected} frames and holds {there}"] if expected > there else []
    if promised is not None:
        parts.append(f"{promised - size:,} of {promised:,} bytes are missing ({(promised - size) / promised:.0%})")
    if ends and stated > ends:
        parts.append(f"{stated - ends:.1f} of {stated:.1f} seconds are missing")
    missing = "; ".join(parts)
    if not allowed:
        raise MediaError(
            f"{file}: truncated, {missing}; copy it again, or allow it (allow_truncated=True, --allow-truncated) to go on "
            "with what is there"
        )
    warnings.warn(f"{file}: truncated, {missing}; going on with what is there", stacklevel=3)
    return missing


def _breaks_off(file: Path, lacking: float, stated: float) -> bool:
    """Whether a file of a format that states its duration, but not its size, ends well before that."""
    return file.suffix.lower() in (".flv", ".mkv", ".webm") and lacking > max(1.0, 0.05 * stated)


def decode_frames(
    path: str | Path,
    indices: Sequence[int],
    *,
    info: VideoInfo | None = None,
    progress: Progress | None = None,
) -> list[NDArray[np.uint8]]:
    """Frames `indices` of a file as uint8 RGB (H, W, 3) arrays, turned upright; only these are kept in memory.

    Where the size of the frames changes on the way, all have that of the first.

    Args:
        path: the file, or its file:// URL.
        indices: frames to read, 0 … frames − 1, in any order, repeats allowed.
        info: from `video_info`, if there already.
        progress: called with (frames read, frames wanted).

    Raises:
        MediaError: as `video_info`; also an index beyond the video, or a frame that cannot be decoded.
    """
    info = info or video_info(path)
    found = _decoded(path, indices, info, progress)
    lost = [index for index in indices if index not in found]
    if lost:
        raise MediaError(
            f"{path}: frame {lost[0]} of {info.frames} cannot be decoded; the file is damaged or truncated"
        )
    return [found[index] for index in indices]


def _decoded(
    path: str | Path, indices: Sequence[int], info: VideoInfo, progress: Progress | None
) -> dict[int, NDArray[np.uint8]]:
    """Frames by number, as far as they can be decoded."""
    wanted = sorted(set(indices))
    if wanted and not 0 <= wanted[0] <= wanted[-1] < info.frames:
        outside = wanted[0] if wanted[0] < 0 else wanted[-1]
        raise MediaError(f"{path}: there is no frame {outside}; the video has frames 0 … {info.frames - 1}")
    file = local_path(path)
    if is_webp(file):
        return read_webp(file, wanted)
    found: dict[int, NDArray[np.uint8]] = {}
    for jump in (True, False):
        with Reader(file, lenient=bool(info.missing)) as reader:
            missing = [index for index in wanted if index not in found]
            for index, frame in reader.select(missing, info.index, jump):
                found[index] = reader.upright(frame)
                if progress is not None:
                    progress(len(found), len(wanted))
    return found


def read_clip(path: str | Path, info: VideoInfo, indices: Sequence[int], progress: Progress | None = None) -> VideoClip:
    """The clip of frames `indices` of a file; of a truncated one without those that cannot be decoded."""
    if not info.missing:
        return VideoClip.of(info, list(indices), decode_frames(path, indices, info=info, progress=progress))
    found = _decoded(path, indices, info, progress)
    there = [index for index in indices if index in found]
    if not there:
        raise MediaError(f"{path}: no frame of it can be decoded; {info.missing}")
    return VideoClip.of(info, there, [found[index] for index in there])


def read_video(
    path: str | Path,
    fps: float | None = None,
    max_frames: int | None = None,
    force_sample: bool = False,
    progress: Progress | None = None,
    *,
    allow_truncated: bool = False,
) -> VideoClip:
    """Sample a file as `sample_indices` says and read those frames."""
    info = video_info(path, allow_truncated=allow_truncated)
    return read_clip(path, info, info.pick(sample_indices, fps, max_frames, force_sample, count=True), progress)
