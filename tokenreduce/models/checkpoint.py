"""A checkpoint folder read strictly: JSON, the headers of safetensors files, and weights that fill a model tensor by tensor.

A checkpoint that does not fill its model is refused. transformers alone would fill the gaps at random.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel

from tokenreduce.config.json_source import read_object, shown, validated
from tokenreduce.errors import CheckpointError
from tokenreduce.models.placement import best_device

Shapes = dict[str, tuple[int, ...]]
"""Shape of each tensor of a checkpoint or model, by its key."""
SIDE_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "special_tokens_map.json",
    "tokenizer_config.json", "video_preprocessor_config.json", "vision_tower_config.json",
)  # fmt: skip
"""Files beside config.json that hold a JSON object each."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class LoadOptions:
    """How to load. None leaves the choice to transformers, and of the device to this machine."""

    dtype: torch.dtype | None = None
    """Of the weights; None: the one the checkpoint states."""
    attn_implementation: str | None = None
    """`sdpa`, `eager`, `flash_attention_2` …"""
    device_map: Any = None
    """As in `from_pretrained`, which needs accelerate for it: `auto` spreads a model over all devices."""
    device: torch.device | None = None
    """One device for the whole model; None, without a `device_map`: the accelerator if there is one, else the CPU."""

    def kwargs(self) -> dict[str, Any]:
        """Arguments for `from_pretrained`. Pickled weights and remote code are never allowed."""
        if self.device is not None and self.device_map is not None:
            raise CheckpointError(f"device {self.device} and device_map {self.device_map}: give one of the two")
        given = {"dtype": self.dtype, "attn_implementation": self.attn_implementation, "device_map": self.device_map}
        device = self.device or best_device()
        if self.device_map is None and device.type != "cpu":
            given["device_map"] = {
                "": str(device)
            }  # Weights go there as they are read, not by way of the host's memory.
        return {"use_safetensors": True, **{name: value for name, value in given.items() if value is not None}}


def load_strict(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    folder: Path,
    options: LoadOptions,
    *,
    renames: Mapping[str, str] | None = None,
    optional: Iterable[str] = (),
) -> PreTrainedModel:
    """`model_class` with exactly the tensors of `folder`.

    Args:
        model_class: its parameters and persistent buffers are what must be filled.
        config: of the native model.
        folder: holds model.safetensors, or shards with model.safetensors.index.json.
        options: dtype, attention and device.
        renames: regular expression → replacement, from checkpoint keys to keys of the model. The first that matches
            is applied, so begin them with ^.
        optional: keys of the model that may be missing because they are tied to another.

    Raises:
        CheckpointError: naming every key that is missing, left over, or of another shape.
    """
    renames = dict(renames or {})
    with torch.device("meta"):
        skeleton = model_class(config)
    wanted = {key: tuple(tensor.shape) for key, tensor in skeleton.state_dict().items()}
    found = {_renamed(key, renames): shape for key, shape in read_shapes(folder).items()}
    check_shapes(wanted, found, folder, optional)
    model, info = model_class.from_pretrained(
        folder, config=config, key_mapping=renames or None, output_loading_info=True, **options.kwargs()
    )
    refuse_gaps(info, str(folder), optional)
    model._weight_conversions = None  # else save_pretrained would undo `renames` and write keys that nothing reads
    return model  # type: ignore[no-any-return]


def read_shapes(folder: Path) -> Shapes:
    """Name and shape of every tensor of a checkpoint, from the headers of its safetensors files alone."""
    shapes: Shapes = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file ({error}); download it again") from None
    return shapes


def check_shapes(wanted: Shapes, found: Shapes, folder: Path, optional: Iterable[str] = ()) -> None:
    """Raise CheckpointError unless `found` has the keys and shapes of `wanted`; `optional` keys may be missing."""
    faults = {
        "missing": sorted(wanted.keys() - found.keys() - set(optional)),
        "left over": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{key} {list(found[key])} instead of {list(wanted[key])}"
            for key in sorted(wanted.keys() & found.keys())
            if found[key] != wanted[key]
        ],
    }
    named = [f"{len(keys)} {kind}: {', '.join(keys)}" for kind, keys in faults.items() if keys]
    if named:
        raise CheckpointError(f"{folder}: the tensors do not fit the model; {'; '.join(named)}")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or a CheckpointError that names the file and the place."""
    return read_object(file, CheckpointError)


def check_folder(folder: Path) -> None:
    """Refuse a checkpoint folder with things in it that are no files, or settings that are not what they should be."""
    for file in sorted(folder.iterdir()):
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise CheckpointError(f"{shown(file)}: is not a regular file; take it out of the checkpoint folder")
    for name in SIDE_FILES:
        if (folder / name).is_file():
            read_json(folder / name)
    generation = folder / "generation_config.json"
    if generation.is_file():
        validated(_Generation, read_json(generation), shown(generation), CheckpointError)


class _Generation(BaseModel):
    """What we read of generation_config.json."""

    model_config = ConfigDict(extra="ignore", strict=True)

    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None


class _Index(BaseModel):
    """An index of shards."""

    weight_map: dict[str, str] = Field(min_length=1)
    """The file that holds each tensor."""


def _renamed(key: str, renames: Mapping[str, str]) -> str:
    for pattern, replacement in renames.items():
        changed, count = re.subn(pattern, replacement, key)
        if count:
            return changed
    return key


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():  # transformers, too, prefers it to shards
        return [single]
    if not index.is_file():
        raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX}; other formats must be converted first")
    names = sorted(set(validated(_Index, read_json(index), shown(index), CheckpointError).weight_map.values()))
    odd = next((name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)), None)
    if odd is not None:
        raise CheckpointError(f"{index}: weight_map: expected names of .safetensors files beside it, got {odd[:60]!r}")
    files = [folder / name for name in names]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(f"{index}: names files that are not in the folder: {', '.join(absent)}; download them")
    return files


def refuse_gaps(info: Mapping[str, Any], name: str, optional: Iterable[str] = ()) -> None:
    """Refuse what transformers would only warn of: parameters it filled at random."""
    missing = sorted(set(info["missing_keys"]) - set(optional))
    misshapen = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if missing or misshapen:
        raise CheckpointError(f"{name}: tensors missing: {', '.join(missing) or 'none'}; of another shape: {misshapen}")


def message_of(error: Exception) -> str:
    """The message of somebody else's error, for the end of ours."""
    return " ".join(str(error).split())[:200] or type(error).__name__
