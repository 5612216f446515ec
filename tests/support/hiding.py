"""An oracle for KV caches that hold less: the dense model over everything at once, whose mask gets a head axis.

From a place on, queries do not see what a head of a layer no longer held. Without a cache, with the family's eager attention.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

HIDING = "hiding_from_heads"
GROUPS, HEADS = 2, 4
CLOSE = 1e-5
"""Eager attention takes its softmax in float32."""
hidden: dict[int, list[tuple[int, Tensor]]] = {}
"""Of each layer: the first query that does not see, and what it does not, (B, H, k) bool; perhaps several times."""


def hiding(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any) -> Any:
    """The family's eager attention, without what is hidden."""
    for first, gone in hidden.get(module.layer_idx, ()):  # type: ignore[arg-type]
        gone = nn.functional.pad(gone, (0, key.shape[2] - gone.shape[2]))[:, :, None].expand(-1, -1, query.shape[2], -1)
        late = torch.arange(query.shape[2])[:, None] >= first
        mask = mask.expand(len(query), HEADS, -1, -1).masked_fill(gone & late, torch.finfo(query.dtype).min)
    return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, mask, **kwargs)


AttentionInterface.register(HIDING, hiding)
AttentionMaskInterface.register(HIDING, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


@contextmanager
def oracle(model: Any, *kept: tuple[dict[int, Tensor], int]) -> Iterator[None]:
    """`model` whose queries from a place on see of what was before only what each KV head of a layer kept: (B, G, n) bool."""
    for layers, first in kept:
        for layer, heads in layers.items():
            hidden.setdefault(layer, []).append((first, ~heads.repeat_interleave(HEADS // GROUPS, 1)))
    before, model.config._attn_implementation_internal = model.config._attn_implementation_internal, HIDING
    try:
        yield
    finally:
        model.config._attn_implementation_internal = before
        hidden.clear()


def double(kind: str = "qwen2") -> Any:
    config = CONFIG_MAPPING[kind](
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, head_dim=8, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
