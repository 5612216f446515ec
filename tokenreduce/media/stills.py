"""Videos that are not in a video file: folders and lists of frame files, PIL images, animated WebP."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tokenreduce.errors import MediaError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
"""Endings of frame files."""
DEFAULT_DELAY = 0.1
"""Seconds that a WebP frame without a duration is shown, as browsers do it."""


def is_frame_file(item: object) -> bool:
    """Whether this is a path that ends as a picture's does."""
    return isinstance(item, str | Path) and Path(item).suffix.lower() in SUFFIXES


def frame_files(folder: Path) -> list[Path]:
    """The pictures in a folder, frame2 before frame10. Raises MediaError where there is none."""
    files = [file for file in folder.iterdir() if is_frame_file(file) and not file.name.startswith(".")]
    if not files:
        endings = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        raise MediaError(
            f"{folder}: a directory without frames; give a video file, or a folder of pictures ({endings})"
        )
    return naturally(files)


def naturally(files: Iterable[Path]) -> list[Path]:
    """Sorted as people number: frame2 before frame10."""
    return sorted(files, key=lambda file: [(int(s), "") if s.isdigit() else (-1, s) for s in _parts(str(file))])


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"([0-9]+)", name.lower()) if part]


def read_pictures(files: Sequence[Path]) -> list[NDArray[np.uint8]]:
    """Pictures as uint8 RGB (H, W, 3) arrays, upright; the others are resized to the size of the first."""
    frames: list[NDArray[np.uint8]] = []
    for file in files:
        try:
            with Image.open(file) as image:
                picture = ImageOps.exif_transpose(image).convert("RGB")
        except FileNotFoundError:
            raise MediaError(f"{file}: no such file") from None
        except (OSError, SyntaxError, ValueError) as error:  # PIL's for files that are damaged, truncated, no pictures.
            raise MediaError(f"{file}: not a readable picture ({error})") from None
        size = (frames[0].shape[1], frames[0].shape[0]) if frames else picture.size
        frames.append(np.asarray(picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC)))
    return frames


def picture_array(image: Image.Image) -> NDArray[np.uint8]:
    """A PIL image as uint8 RGB (H, W, 3)."""
    count = getattr(image, "n_frames", 1)
    if count > 1:
        raise MediaError(f"a PIL image of {count} frames shows only one of them; give the path of its file")
    return np.asarray(image.convert("RGB"))


def is_webp(path: Path) -> bool:
    """By content."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(12)
    return head[:4] == b"RIFF" and head[8:] == b"WEBP"


def webp_frames(path: Path) -> tuple[list[float], float, tuple[int, int]]:
    """Times of the frames, the whole duration, both in seconds, and (width, height). Decodes nothing."""
    delays: list[float] = []
    with path.open("rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], "little")
            following = file.tell() + size + size % 2
            if head[:4] == b"ANMF":
                delays.append(int.from_bytes(file.read(15)[12:], "little") / 1000 or DEFAULT_DELAY)
            file.seek(following)
    try:
        with Image.open(path) as image:
            canvas = image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise MediaError(f"{path}: not a readable WebP ({error})") from None
    delays = delays or [DEFAULT_DELAY]
    ends = np.cumsum(delays).round(3).tolist()
    return [0.0, *ends[:-1]], ends[-1], canvas


def read_webp(path: Path, wanted: Sequence[int]) -> dict[int, NDArray[np.uint8]]:
    """Frames by number, for each of the ascending `wanted`, uint8 RGB (H, W, 3)."""
    try:
        with Image.open(path) as image:
            found = {}
            for index in wanted:
                image.seek(index)
                found[index] = np.asarray(image.convert("RGB"))
            return found
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise MediaError(f"{path}: a frame cannot be decoded ({error}); the file is damaged or truncated") from None
