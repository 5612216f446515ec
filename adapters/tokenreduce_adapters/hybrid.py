"""Decoders that no adapter can serve, and why."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokenreduce.adapter import ModelAdapter
from tokenreduce.errors import UnsupportedError

INDEX = "choose what they attend to by an index of their own beside the KV cache"
BOTH = "run attention and a state side by side, whose cache holds both in one layer"
REASONS = {
    "hybrid": BOTH,
    "hybrid_sliding": BOTH,
    "indexed_attention": INDEX,
    "compressed_sparse_attention": INDEX,
    "heavily_compressed_attention": INDEX,
    "minimax_m3_sparse": INDEX,
    "reference_sliding_attention": "keep a ring buffer that counts on every token being there",
    "chunked_attention": "attend within chunks of the input, whose bounds the engine does not follow",
}
"""Types of `config.layer_types` that the engine does not serve."""
OWN = {
    "jamba": "a cached forward of more than one token ignores the state in transformers itself, so later turns would be wrong",
}
"""Decoders whose layers are of types that the engine serves, and that it does not serve all the same."""


class HybridAdapter(ModelAdapter):
    """Takes models whose decoder cannot be reduced, and refuses them by name with the reason.

    Linear attention, Mamba and convolutions between layers of attention are served: `tokenreduce_adapters.decoder`.
    """

    name = "hybrid"
    notes = "refused: attention and a state in one layer (Falcon-H1, Zamba2), indexers, shared KV caches (Gemma 3n, Gemma 4)"

    def matches(self, model: nn.Module) -> bool:
        return refusal(getattr(model, "config", None)) is not None

    def text_model(self, model: nn.Module) -> nn.Module:
        raise_if_refused(model)
        return super().text_model(model)


def refusal(config: Any) -> str | None:
    """Why tokens cannot be reduced in the decoder of this config, or None if they can."""
    for part in (config, getattr(config, "text_config", None)):
        own = OWN.get(getattr(part, "model_type", ""))
        if own is not None:
            return own
        types = getattr(part, "layer_types", None) or getattr(part, "layers_block_type", None) or ()
        bad = [i for i, kind in enumerate(types) if kind in REASONS]
        if bad:
            kind = types[bad[0]]
            return f"{len(bad)} of its {len(types)} layers, the first is layer {bad[0]} ({kind}), {REASONS[kind]}"
        if types and set(types) <= {"linear_attention", "mamba", "conv", "moe", "mlp"}:
            return "none of its layers has attention, by whose cache the engine counts positions"
        if getattr(part, "hidden_size_per_layer_input", None):
            return "its layers read a second input per token (hidden_size_per_layer_input), which would be misaligned"
        if getattr(part, "num_kv_shared_layers", None):
            return "its last layers read the KV cache of earlier ones (num_kv_shared_layers), which hold other tokens"
    return None


def raise_if_refused(model: nn.Module) -> None:
    """Raise UnsupportedError that names the model and the reason, if there is one."""
    config: Any = getattr(model, "config", None)
    reason = refusal(config)
    if reason is not None:
        raise UnsupportedError(
            f"{type(model).__name__} ({config.model_type}) is not supported: {reason}; use a model of another family"
        )
