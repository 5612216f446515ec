"""MiniCPM-V 2.6 inputs: which frames, how a frame is cut into slices, pixel values and prompt.

A frame becomes one overview and, where it has more than `scale_resolution`² pixels and `max_slice_nums` allows, a grid
of slices. Each of these pictures is resized to about `scale_resolution`² pixels and costs `query_num` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import BatchFeature

from tokenreduce.errors import MediaError
from tokenreduce.media.video import check_sampling
from tokenreduce.models.minicpm_v.modeling import MiniCPMVConfig
from tokenreduce.models.request import VideoQuestion

Size = tuple[int, int]
"""(width, height) in pixels."""
Grid = tuple[int, int]
"""(columns, rows) of slices."""

VIDEO_MAX_SLICES = 2
"""Upstream's setting for video, without image ids; 1 where memory is short."""
VIDEO_FPS, VIDEO_MAX_FRAMES = 1.0, 64


def sample_frames(
    frames: int,
    fps: float,
    target_fps: float = VIDEO_FPS,
    max_frames: int = VIDEO_MAX_FRAMES,
    force_sample: bool = False,
) -> list[int]:
    """Which of `frames` to show: every round(fps / target_fps)-th; if too many, the middles of `max_frames` parts.

    With `force_sample` always the middles of `max_frames` parts of the whole video.
    """
    check_sampling(target_fps, max_frames)
    chosen = range(0, frames, 1 if force_sample else max(1, round(fps / target_fps)))
    if len(chosen) <= max_frames and not force_sample:
        return list(chosen)
    gap = len(chosen) / max_frames
    return [chosen[int(i * gap + gap / 2)] for i in range(max_frames)]


def best_size(size: Size, scale_resolution: int, patch: int) -> Size:
    """The size of about `scale_resolution`² pixels and the aspect of `size` whose sides are multiples of `patch`."""
    ratio = size[0] / size[1]
    height = int(scale_resolution / math.sqrt(ratio))
    width = int(height * ratio)
    return _multiple(width, patch), _multiple(height, patch)


def choose_grid(size: Size, scale_resolution: int, max_slice_nums: int) -> Grid | None:
    """The grid of slices for a picture, or None where it stays whole.

    Among grids of about as many slices as the picture has `scale_resolution`² areas, the one closest to its aspect.
    """
    width, height = size
    wanted = min(math.ceil(width * height / scale_resolution**2), max_slice_nums)
    if wanted <= 1:
        return None
    counts = [n for n in (wanted - 1, wanted, wanted + 1) if 1 < n <= max_slice_nums]
    grids = [(columns, n // columns) for n in counts for columns in range(1, n + 1) if n % columns == 0]
    aspect = math.log(width / height)
    return min(grids, key=lambda grid: abs(aspect - math.log(grid[0] / grid[1])))


def sliced_size(size: Size, grid: Grid, scale_resolution: int, patch: int) -> Size:
    """The size a picture is brought to before `grid` cuts it, so that each slice has its best size."""
    whole = _multiple(size[0], grid[0]), _multiple(size[1], grid[1])
    width, height = best_size((whole[0] // grid[0], whole[1] // grid[1]), scale_resolution, patch)
    return width * grid[0], height * grid[1]


def slice_image(
    image: Image.Image, scale_resolution: int, patch: int, max_slice_nums: int
) -> tuple[list[Image.Image], Grid | None]:
    """The overview of `image`, followed by its slices row by row, and their grid."""
    grid = choose_grid(image.size, scale_resolution, max_slice_nums)
    pictures = [image.resize(best_size(image.size, scale_resolution, patch), Image.Resampling.BICUBIC)]
    if grid is not None:
        columns, rows = grid
        refined = image.resize(sliced_size(image.size, grid, scale_resolution, patch), Image.Resampling.BICUBIC)
        width, height = refined.width // columns, refined.height // rows
        corners = [(column * width, row * height) for row in range(rows) for column in range(columns)]
        pictures += [refined.crop((x, y, x + width, y + height)) for x, y in corners]
    return pictures, grid


def pack_pixels(image: Image.Image, patch: int) -> tuple[Tensor, tuple[int, int]]:
    """Pixel values of an RGB picture with its patches side by side, and the patch grid (rows, columns).

    Returns (3, patch, patch · rows · columns) float32 in −1 … 1; patches run row by row.
    """
    values = (np.asarray(image, dtype=np.float32) / 255 - 0.5) / 0.5
    rows, columns = values.shape[0] // patch, values.shape[1] // patch
    patches = torch.from_numpy(values).view(rows, patch, columns, patch, 3)
    return patches.permute(4, 1, 0, 2, 3).reshape(3, patch, -1), (rows, columns)


def placeholder(grid: Grid | None, query_num: int, image_id: int | None = None) -> str:
    """The text that stands for one frame: number if wanted, overview, and slices with a newline between their rows."""
    queries = "<unk>" * query_num
    number = "" if image_id is None else f"<image_id>{image_id}</image_id>"
    columns, rows = grid or (0, 0)
    slices = "\n".join(f"<slice>{queries}</slice>" * columns for _ in range(rows))
    return f"{number}<image>{queries}</image>{slices}"


def chat_prompt(content: str) -> str:
    """ChatML with the system prompt of upstream's template, up to where the answer begins."""
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    return f"{system}<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def build_inputs(
    frames: Sequence[NDArray[np.uint8]],
    question: str,
    tokenizer: Any,
    config: MiniCPMVConfig,
    *,
    max_slice_nums: int | None = None,
    use_image_id: bool | None = None,
) -> BatchFeature:
    """Inputs of one video.

    Args:
        frames: F uint8 RGB arrays (H, W, 3), in time order; sizes may differ.
        question: what to ask; it follows the frames on a line of its own.
        tokenizer: of the checkpoint.
        config: says patch size, queries per picture and slicing resolution.
        max_slice_nums: slices per frame at most, besides the overview; by default 2, as upstream sets it for video.
        use_image_id: number the frames; by default not, as upstream for video.

    Returns:
        input_ids and attention_mask (1, N) long; pixel_values (1, S, 3, P, L) float32: the S pictures of all frames,
        patches side by side, zeros behind the shorter ones; tgt_sizes (1, S, 2) long: their patch rows and columns.

    Unlike upstream's chat(), which cuts the prompt at 8192 tokens by default (the question with it), nothing is cut.
    """
    most = VIDEO_MAX_SLICES if max_slice_nums is None else max_slice_nums
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise MediaError(
            f"max_slice_nums must be a whole number from 1 on, got {max_slice_nums!r}; 1 keeps frames whole"
        )
    if not frames:
        raise MediaError("the video has no frames")
    patch = config.vision_config.patch_size
    pixels, sizes, texts = [], [], []
    for index, frame in enumerate(frames):
        pictures, grid = slice_image(Image.fromarray(frame), config.scale_resolution, patch, most)
        texts.append(placeholder(grid, config.query_num, index if use_image_id else None))
        for picture in pictures:
            values, size = pack_pixels(picture, patch)
            pixels.append(values)
            sizes.append(size)
    encoded = tokenizer(chat_prompt("\n".join([*texts, question])), return_tensors="pt")
    return BatchFeature(
        {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "pixel_values": _pad_pictures(pixels)[None],
            "tgt_sizes": torch.tensor([sizes]),
        }
    )


def build_video_inputs(request: VideoQuestion, tokenizer: Any, config: MiniCPMVConfig) -> BatchFeature:
    """Inputs for what `prepare` was asked: its frames sampled as upstream does, then `build_inputs`.

    The prompt of this family has no place for a time instruction.
    """
    return build_inputs(
        request.clip(sample_frames, count=True).frames,
        request.question,
        tokenizer,
        config,
        max_slice_nums=request.max_slice_nums,
        use_image_id=request.use_image_id,
    )


def join_pictures(parts: Sequence[BatchFeature]) -> dict[str, Tensor]:
    """pixel_values (B, S, 3, P, L) and tgt_sizes (B, S, 2) of parts with one row each; (0, 0) says that there is no picture."""
    pixels, sizes = [part["pixel_values"] for part in parts], [part["tgt_sizes"] for part in parts]
    most, longest = max(p.shape[1] for p in pixels), max(p.shape[-1] for p in pixels)
    return {
        "pixel_values": torch.cat(
            [F.pad(p, (0, longest - p.shape[-1], 0, 0, 0, 0, 0, most - p.shape[1])) for p in pixels]
        ),
        "tgt_sizes": torch.cat([F.pad(s, (0, 0, 0, most - s.shape[1])) for s in sizes]),
    }


def _multiple(length: int, unit: int) -> int:
    """The multiple of `unit` nearest to `length` (halves to even), at least `unit`."""
    return max(round(length / unit) * unit, unit)


def _pad_pictures(pixels: Sequence[Tensor]) -> Tensor:
    """(S, 3, P, longest) from pictures (3, P, L)."""
    longest = max(values.shape[-1] for values in pixels)
    padded = torch.zeros(len(pixels), *pixels[0].shape[:-1], longest)
    for row, values in zip(padded, pixels, strict=True):
        row[..., : values.shape[-1]] = values
    return padded
