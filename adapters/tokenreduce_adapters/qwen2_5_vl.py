"""Qwen2.5-VL."""

from __future__ import annotations

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
