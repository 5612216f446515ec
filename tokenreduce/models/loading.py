"""Loading a checkpoint: families that tokenreduce reads itself, everything else through transformers, always strictly.

A checkpoint that does not fill its model tensor by tensor is refused. transformers alone would fill the gaps at random.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from tokenreduce.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from transformers import BatchFeature

    from tokenreduce.models.processing import VideoQuestion

Shapes = dict[str, tuple[int, ...]]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class LoadOptions:
    """How to load: each None leaves the choice to transformers (dtype: the one the checkpoint states)."""

    dtype: torch.dtype | None = None
    attn_implementation: str | None = None
    device_map: Any = None

    def kwargs(self) -> dict[str, Any]:
        """Arguments for `from_pretrained`. Pickled weights and remote code are never allowed."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return {"use_safetensors": True, **given}


class Family(ABC):
    """A model family whose checkpoints and prompts tokenreduce handles itself. Add an instance to `families()`."""

    name: ClassVar[str]
    """Unique, lower case, e.g. `llava_video`."""
    model_type: ClassVar[str]
    """`config.model_type` of the native model, which is what `save_pretrained` writes."""

    @abstractmethod
    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a folder with this config.json is a checkpoint of the family in its upstream layout."""

    @abstractmethod
    def load(self, folder: Path, config: Mapping[str, Any], options: LoadOptions) -> PreTrainedModel:
        """The native model with the weights of an upstream folder, by `load_strict`, so that nothing is filled in."""

    @abstractmethod
    def load_native(self, folder: Path, options: LoadOptions) -> PreTrainedModel:
        """The native model from a folder that its own `save_pretrained` wrote. Use `load_strict` here too."""

    @abstractmethod
    def processor(self, folder: Path) -> Any:
        """What `prepare` needs from the checkpoint folder besides the model (usually the tokenizer)."""

    @abstractmethod
    def prepare(self, model: PreTrainedModel, request: VideoQuestion, processor: Any) -> BatchFeature:
        """Inputs for `model(**inputs)` and `model.generate(**inputs)`. `processor` is what `processor()` returned."""


def families() -> tuple[Family, ...]:
    """The families that tokenreduce loads itself."""
    from tokenreduce.models.llava_video.family import LlavaVideoFamily
    from tokenreduce.models.minicpm_v.family import MiniCPMVFamily

    return (LlavaVideoFamily(), MiniCPMVFamily())


def family_of(model: nn.Module) -> Family | None:
    """The family of a loaded model, or None where transformers' own processor is asked."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return next((family for family in families() if family.model_type == model_type), None)


def load_model(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    device_map: Any = None,
) -> PreTrainedModel:
    """Load a model in eval mode from a folder, or by its hub name where the hub can be reached.

    Folders in the upstream layout of LLaVA-Video and MiniCPM-V are recognised by their config.json and mapped onto
    native modules; every other checkpoint goes to transformers. Weights are read from safetensors only, and no code of
    a checkpoint is run.

    Args:
        path_or_id: checkpoint folder, or `organisation/name`.
        dtype: of the weights; by default the one the checkpoint states.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2` …; by default transformers' choice.
        device_map: as in `from_pretrained`, for models larger than one device.

    Raises:
        CheckpointError: no such folder or name, unreadable files, a tensor missing, left over, or of another shape.
        UnsupportedError: an architecture that neither tokenreduce nor the installed transformers knows.
    """
    options = LoadOptions(dtype, attn_implementation, device_map)
    path = Path(path_or_id).expanduser()
    config = read_json(_config_file(path, str(path_or_id)))
    for family in families():
        upstream = family.recognises(config)
        if upstream or config.get("model_type") == family.model_type:
            folder = path if path.is_dir() else _download(str(path_or_id))
            model = family.load(folder, config, options) if upstream else family.load_native(folder, options)
            return model.eval()
    return _load_with_transformers(str(path if path.is_dir() else path_or_id), options).eval()


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
    _refuse_gaps(info, str(folder), optional)
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
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); a checkpoint folder needs it") from None
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


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
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map; save the checkpoint again")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(f"{index}: names files that are not in the folder: {', '.join(absent)}; download them")
    return files


def _config_file(path: Path, name: str) -> Path:
    """config.json of a folder, or of a hub name."""
    if path.is_dir():
        return path / "config.json"
    if path.exists():
        raise CheckpointError(f"{name}: a file; give the checkpoint folder that holds config.json")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise CheckpointError(f"{name}: no such folder, and not a hub name of the form organisation/name")
    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # the hub client raises errors of several libraries
        raise CheckpointError(f"{name}: no such folder, and not found on the model hub ({one_line(error)})") from None


def _download(name: str) -> Path:
    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))


def _load_with_transformers(name: str, options: LoadOptions) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        known = ", ".join(family.name for family in families())
        raise UnsupportedError(
            f"{name}: not an architecture that transformers knows, and tokenreduce itself loads only {known} "
            f"({one_line(error)})"
        ) from None
    vision = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(
            name, config=config, trust_remote_code=False, output_loading_info=True, **options.kwargs()
        )
    except (ValueError, KeyError, OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{name}: transformers cannot load it ({one_line(error)})") from None
    _refuse_gaps(info, name)
    return model  # type: ignore[no-any-return]


def _refuse_gaps(info: Mapping[str, Any], name: str, optional: Iterable[str] = ()) -> None:
    """Refuse what transformers would only warn of: parameters it filled at random."""
    missing = sorted(set(info["missing_keys"]) - set(optional))
    misshapen = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if missing or misshapen:
        raise CheckpointError(f"{name}: tensors missing: {', '.join(missing) or 'none'}; of another shape: {misshapen}")


def one_line(error: Exception) -> str:
    """The message of somebody else's error, for the end of ours."""
    return " ".join(str(error).split())[:200] or type(error).__name__
