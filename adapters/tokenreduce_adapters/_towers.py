"""Vision towers in which frames are the batch: SigLIP, CLIP and InternVL's."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokenreduce.adapter import VisionTower

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
