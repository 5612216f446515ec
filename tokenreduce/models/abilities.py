"""Which strategies a model family can run, and why not the others: from its config alone, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenreduce import plugins
from tokenreduce.adapter import ModelAdapter
from tokenreduce.engine.tower.signals import lacking
from tokenreduce.errors import TokenReduceError, UnsupportedError, nearest, one_line
from tokenreduce.planning.model_config import read_config
from tokenreduce.plugins import AnyStrategy
from tokenreduce.vision import VisionStrategy


def abilities(name: str) -> dict[str, str]:
    """For each strategy that is installed, why the model cannot run it, in a clause; empty where it can.

    name: of an adapter, a model type, a checkpoint that an adapter lists, or the path of a config.json or of its folder. For the
    first three the family's default configuration counts. UnsupportedError for a name that is none of these.
    """
    adapter, model = _model(name)
    return {strategy: why_not(cls, model, adapter) for strategy, cls in plugins.strategies().items()}


def why_not(cls: AnyStrategy, model: nn.Module, adapter: ModelAdapter) -> str:
    """Why `model` cannot run a strategy, in a clause; empty where it can."""
    if issubclass(cls, VisionStrategy):
        tower = adapter.vision_tower(model)
        if tower is None:
            return "its adapter describes no vision tower"
        if tower.grid is not None and cls.capabilities.sites == ("vision.block",):
            return "its vision tower packs the patches of all frames into one sequence"
        return ""
    if "grid" in cls.capabilities.needs and not adapter.grids:
        return f"{cls.name} needs rows and columns, and the vision tokens of {adapter.name} are in no grid"
    text: Any = adapter.text_model(model)
    if cls.capabilities.sites == ("pre_ffn",) and adapter.ffn_pair(text.layers[0]) is None:
        return "its layers have no point between attention and FFN"
    return lacking(cls, model, adapter)


def _model(name: str) -> tuple[ModelAdapter, nn.Module]:
    """An adapter, and the model without memory that it is for."""
    import transformers
    from transformers import CONFIG_MAPPING

    import tokenreduce.models  # noqa: F401  (registers the models of our own)

    path, data = Path(name), dict[str, Any]()
    adapters = [cls() for cls in plugins.adapters()]
    if path.exists():
        data = read_config(path / "config.json" if path.is_dir() else path)
        kind = str(data.get("model_type"))
    else:
        named = [one for one in adapters if name == one.name or name in (*one.model_types, *one.checkpoints)]
        if not named and name not in CONFIG_MAPPING:
            known = [each for one in adapters for each in (one.name, *one.model_types, *one.checkpoints)]
            raise UnsupportedError(f"no model family or checkpoint is called {name}{nearest(name, known)}")
        kind = name if not named or name in named[0].model_types else next(iter(named[0].model_types), "")
    if kind not in CONFIG_MAPPING:
        raise UnsupportedError(f"{name}: transformers has no model of type '{kind}'")
    try:
        config = CONFIG_MAPPING[kind].from_dict(data) if data else CONFIG_MAPPING[kind]()
        with torch.device("meta"):
            try:
                model: nn.Module = transformers.AutoModelForImageTextToText.from_config(config)
            except ValueError:
                model = transformers.AutoModelForCausalLM.from_config(config)
    except TokenReduceError:
        raise
    except Exception as error:
        raise UnsupportedError(f"{name}: its model cannot be made from its config: {one_line(error)}") from None
    for one in adapters:
        if one.matches(model):
            return one, model
    raise UnsupportedError(f"{name}: no adapter is for models of type '{kind}'")
