"""A question about a video, as a family is handed it, and the frames that it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokenreduce.errors import MediaError
from tokenreduce.media.video import FPS, VideoClip, VideoInfo, decode_frames, video_info

Video = str | Path | NDArray[np.uint8] | Sequence[NDArray[np.uint8]]
"""Path of a video file, or sampled frames: uint8 RGB (F, H, W, 3), or a list of (H, W, 3) or (f, H, W, 3) arrays."""


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
    """Frames of a file at most."""
    force_sample: bool | None = None
    """Whether to spread `max_frames` over any file."""
    progress: Callable[[int, int], None] | None = None
    """Called with (frames decoded, frames wanted)."""

    def clip(self, choose: Callable[[VideoInfo], list[int]]) -> VideoClip:
        """The frames to show: those `choose` picks from a file, or all of an array, which was sampled by the caller."""
        if isinstance(self.video, str | Path):
            if self.frame_times is not None or self.duration is not None:
                raise MediaError(f"{self.video}: frame_times and duration belong to arrays; a video file has its own")
            info = video_info(self.video)
            indices = choose(info)
            return VideoClip.of(info, indices, decode_frames(self.video, indices, info=info, progress=self.progress))
        return self._given_clip(_frame_list(self.video))

    def _given_clip(self, frames: list[NDArray[np.uint8]]) -> VideoClip:
        count, fps = len(frames), self.fps or FPS
        if self.frame_times is None:
            times, duration = [i / fps for i in range(count)], count / fps if self.duration is None else self.duration
        elif len(self.frame_times) != count:
            raise MediaError(f"frame_times has {len(self.frame_times)} entries for {count} frames; give one per frame")
        elif self.duration is None:
            raise MediaError("frame_times without duration: give the length of the video in seconds as well")
        else:
            times, duration = [float(time) for time in self.frame_times], self.duration
        return VideoClip(frames=frames, times=times, duration=float(duration), fps=fps, indices=list(range(count)))


def _frame_list(video: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """One (H, W, 3) array per frame."""
    frames: list[NDArray[np.uint8]] = []
    for item in video:
        array = np.asarray(item)
        if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] != 3 or 0 in array.shape:
            raise MediaError(f"frames must be uint8 RGB arrays (F, H, W, 3), got {array.dtype} {array.shape}")
        frames += [array] if array.ndim == 3 else list(array)
    if not frames:
        raise MediaError("the video has no frames")
    return frames
