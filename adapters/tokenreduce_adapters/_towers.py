"""Vision towers in which frames are the batch: SigLIP, CLIP and InternVL's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tokenreduce.adapter import TowerCall, VisionTower

PREFIX = {"siglip_vision_model": 0, "clip_vision_model": 1, "internvl_vision": 1}
"""Class tokens before the patches, by the tower's model_type."""


def frames_tower(model: nn.Module) -> VisionTower | None:
    """The tower of `model`, with the blocks that its features come through; None for a tower of another kind."""
    whole: Any = getattr(model, "model", model)
    tower: Any = getattr(whole, "vision_tower", None)
    kind = getattr(getattr(tower, "config", None), "model_type", None)
    if kind not in PREFIX:
        return None
    encoder = getattr(tower, "vision_model", tower).encoder
    blocks = list(encoder.layer if kind == "internvl_vision" else encoder.layers)
    size = tower.config.patch_size
    return VisionTower(
        module=tower,
        blocks=blocks[: _depth(whole.config.vision_feature_layer, len(blocks))],
        patch=int(size if isinstance(size, int) else size[0]),
        prefix=PREFIX[kind],
        mask=None if kind == "internvl_vision" else "attention_mask",
    )


def _depth(layer: int | list[int], blocks: int) -> int:
    """How many blocks the hidden states of `layer` have passed; hidden state 0 has passed none."""
    layers = [layer] if isinstance(layer, int) else layer
    return max(one if one >= 0 else blocks + 1 + one for one in layers)


def frames_signals(model: nn.Module) -> dict[str, str]:
    """What a tower of `frames_tower` can tell, see `ModelAdapter.tower_signals`."""
    tower = frames_tower(model)
    if tower is None:
        why = "its vision tower is of a kind that is not described"
        return dict.fromkeys(("tower.cls", "tower.mean", "tower.keys", "tower.pooled"), why)
    cls = "" if tower.prefix else "its vision tower has no class token"
    config: Any = tower.module.config
    pools = config.model_type == "clip_vision_model" or getattr(config, "vision_use_head", False)
    pooled = "" if pools else "its vision tower has no pooled output"
    return {"tower.cls": cls, "tower.mean": "", "tower.keys": "", "tower.pooled": pooled}


def shuffled_mean(shuffled: Tensor, channels: int) -> Tensor:
    """(tokens, C): the mean of the patches that a pixel shuffle has put side by side, (…, patches · C)."""
    return shuffled.reshape(-1, shuffled.shape[-1] // channels, channels).mean(1)


def one_per_frame(call: TowerCall, patches: int) -> TowerCall:
    """A call that told one vector per frame, as if each of its patches had it."""
    return call if call.values.shape[1] == patches else replace(call, values=call.values.expand(-1, patches, -1))
