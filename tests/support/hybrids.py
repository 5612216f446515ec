"""Tiny random hybrid decoders, and what each computes on a shortened sequence, layer by layer and row by row.

The oracle knows nothing of the engine: one row, no padding, no cache. It calls the layers by hand over all tokens that were
ever fed, with masks made from their places, and takes the rows that stay at the layer of the reduction.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

F, S, L, C = "full_attention", "sliding_attention", "linear_attention", "conv"
BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 16,
}
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_chunk_size": 16,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DECODERS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**DELTA, "num_hidden_layers": 5, "layer_types": [L, L, F, L, F]},
    "qwen3_next": {
        **DELTA, **EXPERTS, "num_hidden_layers": 4, "layer_types": [L, F, L, F], "shared_expert_intermediate_size": 16,
    },
    "olmo_hybrid": {**DELTA, "num_hidden_layers": 4, "layer_types": [L, L, F, F]},
    "nemotron_h": {
        "head_dim": 16, "layers_block_type": [L, "moe", F, "mlp", L, F], "ssm_state_size": 8, "mamba_num_heads": 8,
        "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 16, "n_routed_experts": 4, "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "lfm2": {"num_hidden_layers": 5, "layer_types": [C, F, C, F, C], "block_auto_adjust_ff_dim": False},
    "bamba": {**MAMBA, "num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {
        **MAMBA, "num_hidden_layers": 4, "layer_types": [L, F, L, F], "num_local_experts": 0,
        "shared_intermediate_size": 48, "position_embedding_type": "rope",
    },
}  # fmt: skip
"""Of each family the shape that it is made in."""


@cache
def decoder(kind: str) -> Any:
    """A random model whose every parameter matters, always the same."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**BASE, **DECODERS[kind]})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def kinds(config: Any) -> list[str]:
    """What each layer is."""
    return list(config.layer_types)


@torch.no_grad()
def dense(model: Any, ids: Tensor, site: int, kept: Tensor) -> Tensor:
    """(kept, V) logits of the tokens ids (n,), of which only `kept` (k,) go on from the input of layer `site`."""
    text, config = model.model, model.config
    place = torch.arange(len(ids))
    x = model.get_input_embeddings()(ids[None])
    if hasattr(config, "embedding_multiplier"):
        x = x * config.embedding_multiplier
    for number, (layer, kind) in enumerate(zip(text.layers, kinds(config), strict=True)):
        if number == site:
            x, place = x[:, kept], place[kept]
        arguments: dict[str, Any] = {"attention_mask": _mask(place, kind, config, x), "position_ids": place[None]}
        tables = _tables(text, config, x, place, kind)
        if tables is not None:
            arguments["position_embeddings"] = tables
        out = layer(x, **arguments)
        x = out[0] if isinstance(out, tuple) else out
    norm = next(
        getattr(text, name) for name in ("norm", "norm_f", "embedding_norm", "final_layernorm") if hasattr(text, name)
    )
    logits: Tensor = model.lm_head(norm(x))[0]
    return logits / getattr(config, "logits_scaling", 1)


def _mask(place: Tensor, kind: str, config: Any, x: Tensor) -> Tensor | None:
    if kind not in (F, S):
        return None
    ahead = place[:, None] - place[None]
    seen = (ahead >= 0) & ((ahead < config.sliding_window) if kind == S else torch.tensor(True))
    return torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)[None, None]


def _tables(text: Any, config: Any, x: Tensor, place: Tensor, kind: str) -> Any:
    rotary = getattr(text, "rotary_emb", None)
    if rotary is None:
        return None
    if config.model_type == "qwen3_5_text":
        return rotary(x, place.expand(3, 1, -1))
    return rotary(x, place[None])
