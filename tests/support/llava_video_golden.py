"""The golden LLaVA-Video case: a tiny checkpoint in upstream layout, its frames, and tensors from the upstream code."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config, SiglipVisionConfig

from tokenreduce.models.llava_video.modeling import LlavaVideoConfig

GOLDEN = Path(__file__).parents[1] / "data" / "llava_video"
CHECKPOINT = GOLDEN / "checkpoint"
INDEX: dict[str, Any] = json.loads((GOLDEN / "index.json").read_text())
QUESTION = "Please describe this video in detail."
TIMES, DURATION = [0.0, 4.12, 8.28, 12.44], 12.48


@cache
def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


@cache
def frames(count: int, seed: int, height: int = 384, width: int = 384) -> NDArray[np.uint8]:
    """(F, H, W, 3) uint8, by the formula in FRAMES.md."""
    f, y, x, c = np.ogrid[:count, :height, :width, :3]
    by, bx = y // 16, x // 16
    moment = np.where((7 * by + 3 * bx) % 4 == 0, f + 1, 0)
    h = np.array(2166136261 ^ seed, dtype=np.uint32)
    for value in (moment + 1, by + 1, bx + 1, c + 1):
        h = (h ^ value.astype(np.uint32)) * np.uint32(2654435761)
        h = h ^ (h >> np.uint32(15))
    return (((h >> np.uint32(24)).astype(np.int64) + x // 4 + 2 * (y // 8) + f) % 256).astype(np.uint8)


def golden_frames() -> NDArray[np.uint8]:
    return frames(INDEX["frames"]["n"], INDEX["frames"]["seed"])


def copy_checkpoint(folder: Path, **changes: Any) -> Path:
    """The golden checkpoint in `folder`, with fields of its config changed; None takes a field out."""
    shutil.copytree(CHECKPOINT, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if not (name in changes and value is None)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shard(folder: Path, pieces: int) -> None:
    """Split model.safetensors of `folder` into shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for piece in range(pieces):
        name = f"model-{piece + 1:05}-of-{pieces:05}.safetensors"
        part = dict(list(tensors.items())[piece::pieces])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tiny_config(image_size: int = 48, patch_size: int = 8, **changes: Any) -> LlavaVideoConfig:
    """A config for random weights; 299 stands for video, 298 for image tokens."""
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    tokens = {"video_token_index": 299, "image_token_index": 298}
    return LlavaVideoConfig(vision_config=vision, text_config=text, **{**tokens, **changes})
