"""Adapters for the model families that tokenreduce knows, registered as a third party's would be."""

from __future__ import annotations

from tokenreduce.adapter import ModelAdapter
from tokenreduce.hookspecs import hookimpl
from tokenreduce_adapters.decoder import DecoderAdapter
from tokenreduce_adapters.hybrid import HybridAdapter
from tokenreduce_adapters.internvl import InternVLAdapter
from tokenreduce_adapters.llava import LlavaAdapter, LlavaNextAdapter
from tokenreduce_adapters.llava_next_video import LlavaNextVideoAdapter
from tokenreduce_adapters.llava_onevision import LlavaOnevisionAdapter
from tokenreduce_adapters.llava_video import LlavaVideoAdapter
from tokenreduce_adapters.minicpm_v import MiniCPMVAdapter
from tokenreduce_adapters.qwen2_5_vl import Qwen25VLAdapter
from tokenreduce_adapters.qwen2_vl import Qwen2VLAdapter
from tokenreduce_adapters.qwen3_vl import Qwen3VLAdapter
from tokenreduce_adapters.smolvlm import SmolVLMAdapter

ADAPTERS: list[type[ModelAdapter]] = [
    LlavaVideoAdapter,
    MiniCPMVAdapter,
    LlavaOnevisionAdapter,
    LlavaNextVideoAdapter,
    LlavaNextAdapter,
    LlavaAdapter,
    Qwen2VLAdapter,
    Qwen25VLAdapter,
    Qwen3VLAdapter,
    InternVLAdapter,
    SmolVLMAdapter,
    DecoderAdapter,
    HybridAdapter,
]


@hookimpl
def tokenreduce_adapters() -> list[type[ModelAdapter]]:
    """Our adapters. No model fits two of them, so their order has no meaning."""
    return list(ADAPTERS)
