"""A question about a video, as a family is handed it, and the frames that it shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenreduce.errors import MediaError
from tokenreduce.media.reader import local_path
from tokenreduce.media.stills import frame_files, is_frame_file, naturally, picture_array, read_pictures
from tokenreduce.media.video import FPS, Progress, Rule, VideoClip, VideoInfo, check_sampling, read_clip, video_info

Frames = NDArray[np.uint8] | Sequence[NDArray[np.uint8] | Image.Image] | Sequence[str | Path]
Video = str | Path | VideoClip | Frames
"""Path or file:// URL of a video file; path of a folder of frame files, or a list of such files; or sampled frames: uint8 RGB
(F, H, W, 3), or a list of (H, W, 3) or (f, H, W, 3) arrays or PIL images; or the clip that `look` returned."""


@dataclass(frozen=True)
class VideoQuestion:
    """What `prepare` was asked. None means: as the model was made for."""

    video: Video
    """A file, or frames that the caller sampled."""
    question: str
    """Text, without any prompt around it."""
    frame_times: Sequence[float] | None = None
    """Seconds, one per frame of an array."""
    duration: float | None = None
    """Seconds, length of the video an array was taken from."""
    time_instruction: bool = True
    """Whether to tell the model duration and frame times, where its prompt has a place for them."""
    max_slice_nums: int | None = None
    """MiniCPM-V: slices per frame at most."""
    use_image_id: bool | None = None
    """MiniCPM-V: whether frames are numbered."""
    fps: float | None = None
    """Frames per second to sample from a file; of an array, what it counts as sampled at."""
    max_frames: int | None = None
    """Frames at most. Of more frames that were given one by one, so many are spread evenly."""
    force_sample: bool | None = None
    """Whether to spread `max_frames` over any file."""
    allow_truncated: bool = False
    """Whether to go on with what is there of a file that broke off."""
    info: VideoInfo | None = None
    """What `video_info` said of the file, if it was asked already."""
    progress: Progress | None = None
    """Called with (frames decoded, frames wanted)."""

    def __post_init__(self) -> None:
        """MediaError, with the value, where an argument makes no sense."""
        if not isinstance(self.question, str):
            raise MediaError(f"the question must be text, got {self.question!r}")
        if not self.question.strip():
            raise MediaError(f"the question is empty ({self.question!r})")
        check_sampling(self.fps, self.max_frames)
        if self.frame_times is not None:
            check_times(self.frame_times)
        if self.duration is not None and not 0 <= _number("duration", self.duration) < math.inf:
            raise MediaError(f"duration must be a number of seconds from 0 on, got {self.duration!r}")

    def clip(self, rule: Rule, force: bool | None = None, *, count: bool = False) -> VideoClip:
        """The frames to show: those that `rule` picks from a file, see `VideoInfo.pick`, or those that the caller gave.

        force: what `force_sample` is where nobody asked.
        """
        if isinstance(self.video, VideoClip):
            return self.video
        if isinstance(self.video, str | Path) and not local_path(self.video).is_dir():
            self._refuse_times()
            info = self.info or video_info(self.video, allow_truncated=self.allow_truncated)
            forced = bool(force if self.force_sample is None else self.force_sample)
            indices = info.pick(rule, self.fps, self.max_frames, forced, count=count)
            return read_clip(self.video, info, indices, self.progress)
        return self._given_clip()

    def shorter(self, clip: VideoClip, most: int, rule: Rule, *, count: bool = False) -> VideoClip:
        """Times and duration as they would be with only `most` of the frames of `clip`; any frames stand for them.

        Of frames with times of their own, the last ones: their times are the longest to write.
        """
        times, duration = clip.times[-most:], clip.duration
        if clip.info is not None:
            times = clip.info.times[clip.info.pick(rule, self.fps, most, True, count=count)].tolist()
        elif self.frame_times is None and not isinstance(self.video, VideoClip):
            times = clip.times[:most]
            duration = most / clip.fps if self.duration is None else duration
        return VideoClip(clip.frames[:most], times, duration, clip.fps, clip.indices[:most])

    def _refuse_times(self) -> None:
        if self.frame_times is not None or self.duration is not None:
            raise MediaError(f"{self.video}: frame_times and duration belong to arrays; a video file has its own")

    def _given_clip(self) -> VideoClip:
        files = self._files()
        given: Any = files if files is not None else frame_list(self.video)
        total = len(given)
        indices = list(range(total))
        if self.max_frames is not None and total > self.max_frames:
            indices = [int(i) for i in np.linspace(0, total - 1, self.max_frames, dtype=int)]
        times, duration, fps = self._times(total)
        chosen = [given[i] for i in indices]
        frames = chosen if files is None else read_pictures(chosen)
        return VideoClip(frames, [times[i] for i in indices], duration, fps, indices, total)

    def _times(self, count: int) -> tuple[list[float], float, float]:
        """Seconds of all frames that were given, their duration, and their rate."""
        fps = FPS if self.fps is None else self.fps
        if self.frame_times is None:
            return [i / fps for i in range(count)], count / fps if self.duration is None else float(self.duration), fps
        if len(self.frame_times) != count:
            raise MediaError(f"frame_times has {len(self.frame_times)} entries for {count} frames; give one per frame")
        if self.duration is None:
            raise MediaError("frame_times without duration: give the length of the video in seconds as well")
        return [float(time) for time in self.frame_times], float(self.duration), fps

    def _files(self) -> list[Path] | None:
        """The frame files that the video is, in order; None where it is something else."""
        if isinstance(self.video, str | Path):
            files = frame_files(local_path(self.video))
        elif isinstance(self.video, Sequence) and self.video and all(isinstance(i, str | Path) for i in self.video):
            others = [item for item in self.video if not is_frame_file(item)]
            if others:
                raise MediaError(
                    f"a list of {len(self.video)} files for one question, and {others[0]} is no picture; give a list of as "
                    "many questions, or one video"
                )
            files = naturally(local_path(str(item)) for item in self.video)
        else:
            return None
        if self.fps is None and self.frame_times is None:
            raise MediaError(
                f"{files[0].parent}: {len(files)} frame files do not say how far apart they are; give fps, the frames per "
                "second that they were taken at"
            )
        return files


def check_times(times: Sequence[float]) -> None:
    """MediaError unless these are numbers of seconds from 0 on, in ascending order."""
    before = 0.0
    for place, time in enumerate(times):
        if not 0 <= _number(f"frame_times[{place}]", time) < math.inf:
            raise MediaError(f"frame_times[{place}] must be a number of seconds from 0 on, got {time!r}")
        if time < before:
            raise MediaError(f"frame_times must ascend: frame_times[{place}] is {time!r}, after {before!r}")
        before = time


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise MediaError(f"{name} must be a number of seconds, got {value!r}") from None


def frame_list(video: Any) -> list[NDArray[np.uint8]]:
    """One (H, W, 3) array per frame of what the caller sampled."""
    if isinstance(video, Image.Image):
        video = [video]
    if not isinstance(video, np.ndarray | Sequence):
        raise MediaError(f"a video is a path, an array of frames or a list of them, got a {type(video).__name__}")
    frames: list[NDArray[np.uint8]] = []
    for item in video:
        array = picture_array(item) if isinstance(item, Image.Image) else np.asarray(item)
        if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] != 3 or 0 in array.shape:
            raise MediaError(f"frames must be uint8 RGB arrays (F, H, W, 3), got {array.dtype} {array.shape}")
        frames += [array] if array.ndim == 3 else list(array)
    if not frames:
        raise MediaError("the video has no frames")
    return frames
