"""Loading a checkpoint: families that tokenreduce reads itself, everything else through transformers, always strictly."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from tokenreduce.config.json_source import exists, expanded, shown
from tokenreduce.errors import CheckpointError, UnsupportedError, foreign, one_line
from tokenreduce.models.checkpoint import LoadOptions, check_folder, message_of, read_json, read_shapes, refuse_gaps
from tokenreduce.models.family import Family
from tokenreduce.models.llava_video.family import LlavaVideoFamily
from tokenreduce.models.minicpm_v.family import MiniCPMVFamily
from tokenreduce.models.placement import parse_device
from tokenreduce.planning.model_config import check_config

SPARE = 10**6
"""Parameters that a model may have beyond twice its checkpoint: tied ones are stored once."""
EMBEDDED = "embedded"
"""The name of the model that ships inside the package; `./embedded` is a folder of that name."""
EMBEDDED_FOLDER = Path(__file__).parents[1] / "testbed" / "weights"
"""Its checkpoint."""


_log = logging.getLogger(__name__)


def families() -> tuple[Family, ...]:
    """The families that tokenreduce loads itself."""
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
    device: str | torch.device | None = None,
    device_map: Any = None,
) -> PreTrainedModel:
    """Load a model in eval mode from a folder, or by its hub name where the hub can be reached.

    Folders in the upstream layout of LLaVA-Video and MiniCPM-V are recognised by their config.json and mapped onto
    native modules; every other checkpoint goes to transformers. Weights are read from safetensors only, and no code of
    a checkpoint is run.

    Args:
        path_or_id: checkpoint folder, `organisation/name`, or `embedded`: the small model inside the package.
        dtype: of the weights; by default the one the checkpoint states.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2` …; by default transformers' choice.
        device: `cuda`, `cuda:1`, `mps`, `xpu` or `cpu`; by default the accelerator if there is one.
        device_map: as in `from_pretrained`, for models larger than one device: `auto` spreads them.

    Raises:
        CheckpointError: no such folder or name, unreadable files, a tensor missing, left over, or of another shape.
        UnsupportedError: an architecture that neither tokenreduce nor the installed transformers knows.
    """
    options = LoadOptions(dtype, attn_implementation, device_map, None if device is None else parse_device(device))
    path = EMBEDDED_FOLDER if path_or_id == EMBEDDED else expanded(path_or_id, CheckpointError)
    file = _config_file(path, str(path_or_id))
    config = read_json(file)
    check_config(config, shown(file), CheckpointError)
    if path.is_dir():
        check_folder(path)
    _log.info("loading %s (%s)", shown(path_or_id), config.get("model_type"))
    for family in families():
        upstream = family.recognises(config)
        if upstream or config.get("model_type") == family.model_type:
            _refuse_quantised(config, family.name, str(path_or_id))
            folder = path if path.is_dir() else _download(str(path_or_id))
            with foreign(CheckpointError, f"{shown(folder)}: cannot be loaded"):
                model = family.load(folder, config, options) if upstream else family.load_native(folder, options)
            return model.eval()
    return _load_with_transformers(str(path if path.is_dir() else path_or_id), options).eval()


def checkpoint_folder(path_or_id: str | Path) -> Path:
    """The folder of a checkpoint: itself, or where the hub client keeps the files of a hub name, fetched if need be."""
    path = expanded(path_or_id, CheckpointError)
    if path.is_dir():
        return path
    file = _config_file(path, str(path_or_id))  # Says what is wrong with other names.
    try:
        return _download(str(path_or_id))
    except Exception as error:  # the hub client raises errors of several libraries
        if any(file.parent.glob("*.safetensors")):
            return file.parent
        raise CheckpointError(f"{shown(path_or_id)}: its files cannot be fetched ({message_of(error)})") from None


def _config_file(path: Path, name: str) -> Path:
    """config.json of a folder, or of a hub name."""
    if path.is_dir():
        return path / "config.json"
    if exists(path):
        raise CheckpointError(f"{shown(name)}: a file; give the checkpoint folder that holds config.json")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise CheckpointError(f"{shown(name)}: no such folder, and not a hub name of the form organisation/name")
    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # the hub client raises errors of several libraries
        raise CheckpointError(f"{name}: no such folder, and not found on the model hub ({message_of(error)})") from None


def _download(name: str) -> Path:
    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))


def _refuse_quantised(config: Mapping[str, Any], family: str, name: str) -> None:
    """Refuse, by the method's name, a quantised checkpoint of a family that tokenreduce loads itself."""
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
        if method is None and isinstance(quantised, Mapping) and (quantised.keys() & {"load_in_4bit", "load_in_8bit"}):
            method = "bitsandbytes"
        raise UnsupportedError(
            f"{shown(name)}: its weights are quantised ({method or 'by a method that its config.json does not name'}), which "
            f"tokenreduce's own loader of {family} does not read; load an unquantised checkpoint, or a quantised one of a family "
            "that transformers loads"
        )


def _refuse_larger(name: str, auto: Any, config: Any) -> None:
    """CheckpointError where config.json describes a model much larger than the weights beside it, which could fill the memory."""
    folder = Path(name)
    if not folder.is_dir() or getattr(config, "quantization_config", None) is not None:
        return
    stored = sum(math.prod(shape) for shape in read_shapes(folder).values())
    with torch.device("meta"):
        described = sum(int(each.numel()) for each in auto.from_config(config).parameters())
    if described > 2 * stored + SPARE:
        raise CheckpointError(
            f"{shown(folder / 'config.json')}: describes {described:,} parameters, but the weights beside it "
            f"hold {stored:,}; they do not belong together"
        )


def _load_with_transformers(name: str, options: LoadOptions) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        known = ", ".join(family.name for family in families())
        raise UnsupportedError(
            f"{shown(name)}: not an architecture that transformers knows, and tokenreduce itself loads only {known} "
            f"({message_of(error)})"
        ) from None
    except Exception as error:
        raise CheckpointError(f"{shown(name)}: its config.json cannot be used ({one_line(error, 200)})") from error
    vision = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    with foreign(CheckpointError, f"{shown(name)}: transformers cannot load it"):
        _refuse_larger(name, auto, config)
        model, info = auto.from_pretrained(
            name, config=config, trust_remote_code=False, output_loading_info=True, **options.kwargs()
        )
    refuse_gaps(info, name)
    return model  # type: ignore[no-any-return]
