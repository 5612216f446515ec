"""What the MiniCPM-V tests share: golden tensors made by upstream's code, and the tiny checkpoint they belong to."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenreduce.models.checkpoint import LoadOptions, read_json
from tokenreduce.models.minicpm_v.family import MiniCPMVFamily
from tokenreduce.models.minicpm_v.modeling import MiniCPMVForConditionalGeneration

DATA = Path(__file__).parents[1] / "data" / "minicpm_v"
FAMILY = MiniCPMVFamily()
CASES = {"video_1slice": ("What moves?", 1), "video_sliced": ("Describe the video", 2)}
"""Question and max_slice_nums of each golden case."""


@lru_cache
def golden(name: str) -> dict[str, Tensor]:
    return load_file(DATA / f"{name}.safetensors")


def table(name: str) -> Any:
    return json.loads((DATA / f"{name}.json").read_text())


def upstream_folder(target: Path, **config: Any) -> Path:
    """A checkpoint in upstream's layout; `config` overrides fields of config.json, None removes them."""
    shutil.copytree(DATA / "checkpoint", target)
    shutil.copy(DATA / "state_dict.safetensors", target / "model.safetensors")
    changed = {k: v for k, v in (read_json(target / "config.json") | config).items() if v is not None}
    (target / "config.json").write_text(json.dumps(changed))
    return target


def write_shards(folder: Path, count: int) -> None:
    """Replace model.safetensors by `count` shards and their index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for shard in range(count):
        name = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        part = {key: state[key] for key in sorted(state)[shard::count]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> MiniCPMVForConditionalGeneration:
    return FAMILY.load(folder, read_json(folder / "config.json"), LoadOptions(dtype=dtype)).eval()


def golden_inputs(name: str) -> dict[str, Tensor]:
    """The golden case as inputs of the native model, without our processing."""
    case = golden(name)
    packed = [case[f"pixel_values.{i}"] for i in range(len(case["tgt_sizes"]))]
    longest = max(p.shape[-1] for p in packed)
    pixels = torch.stack([torch.nn.functional.pad(p, (0, longest - p.shape[-1])) for p in packed])
    return {
        "input_ids": case["input_ids"],
        "attention_mask": case["attention_mask"],
        "pixel_values": pixels[None],
        "tgt_sizes": case["tgt_sizes"][None],
    }


def pad_left(rows: list[dict[str, Tensor]], pad: int) -> dict[str, Tensor]:
    """One batch of single-row inputs, ids padded on the left, pictures with pictures of size (0, 0)."""
    width = max(row["input_ids"].shape[1] for row in rows)
    pictures = max(row["tgt_sizes"].shape[1] for row in rows)
    longest = max(row["pixel_values"].shape[-1] for row in rows)

    def grown(row: dict[str, Tensor]) -> dict[str, Tensor]:
        left = width - row["input_ids"].shape[1]
        more = pictures - row["tgt_sizes"].shape[1]
        right = longest - row["pixel_values"].shape[-1]
        return {
            "input_ids": torch.nn.functional.pad(row["input_ids"], (left, 0), value=pad),
            "attention_mask": torch.nn.functional.pad(row["attention_mask"], (left, 0)),
            "pixel_values": torch.nn.functional.pad(row["pixel_values"], (0, right, 0, 0, 0, 0, 0, more)),
            "tgt_sizes": torch.nn.functional.pad(row["tgt_sizes"], (0, 0, 0, more)),
        }

    parts = [grown(row) for row in rows]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def greedy(model: MiniCPMVForConditionalGeneration, inputs: dict[str, Tensor], **kwargs: object) -> Tensor:
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False} | kwargs
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
