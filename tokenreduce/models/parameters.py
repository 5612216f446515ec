"""How many parameters a model has, counted without its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import transformers

from tokenreduce.planning.architectures import Architecture, architectures
from tokenreduce.planning.cost import DecoderShape
from tokenreduce.planning.model_config import read_config


def counted(arch: Architecture) -> Architecture:
    """`arch`, with `parameters` of the model that its config.json describes: built on the meta device, without memory.

    Where transformers has no such model the vision tower is taken to be that of the known one; the note says so.
    """
    if arch.name in architectures() or arch.parameters is not None:
        return arch
    path = Path(arch.name)
    total = _count(path, arch.shape) if path.exists() else None
    tower = f"a vision tower of {arch.vision_parameters / 1e6:.0f} M" if arch.vision_parameters else "no vision tower"
    how = "all weights counted" if total else f"weights from the decoder's shape, and {tower}"
    return replace(arch, parameters=total, note=f"{arch.note}; {how}")


def _count(path: Path, shape: DecoderShape) -> int | None:
    """Parameters of transformers' model for a config.json; None where it has none, or one with another decoder."""
    config = read_config(path)
    kind = getattr(transformers, next(iter(config.get("architectures") or ()), ""), None)
    config_class = getattr(kind, "config_class", None)
    if kind is None or config_class is None:
        return None
    try:
        with torch.device("meta"):
            model = kind(config_class.from_dict(config))
        if DecoderShape.from_config(model.config) != shape:
            return None
    except Exception:  # each model class has its own kinds; without a count the plan goes by the shape
        return None
    return sum(int(parameter.numel()) for parameter in model.parameters())
