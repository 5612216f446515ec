"""Qwen2.5-VL."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenreduce.adapter import TowerCall
from tokenreduce_adapters._runs import Kind, settings
from tokenreduce_adapters.qwen2_vl import Qwen2VLAdapter


class Qwen25VLAdapter(Qwen2VLAdapter):
    """As Qwen2-VL. Its temporal positions count time and may repeat from frame to frame, so they are not read."""

    name = "qwen2_5_vl"
    model_types = ("qwen2_5_vl",)
    checkpoints = (
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "Qwen/Qwen2.5-VL-32B-Instruct",
        "Qwen/Qwen2.5-VL-72B-Instruct",
    )

    def tokens_of(self, model: nn.Module, kind: Kind, call: TowerCall) -> Tensor:
        # Costs seconds, which commands that only list plugins need not spend.
        from transformers.vision_utils import get_vision_window_index

        assert call.grid is not None
        config = settings(model).vision_config
        order, _ = get_vision_window_index(
            call.grid,
            spatial_merge_size=config.spatial_merge_size,
            window_size=config.window_size,
            patch_size=config.patch_size,
        )
        return super().tokens_of(model, kind, call)[torch.argsort(order).to(call.values.device)]
