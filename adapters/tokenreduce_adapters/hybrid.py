"""Decoders that no adapter can serve, and why."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokenreduce.adapter import ModelAdapter
from tokenreduce.errors import UnsupportedError

STATE = "carry a state through every token, so a token taken out changes all that follow"
INDEX = "choose what they attend to by an index of their own beside the KV cache"
REASONS = {
    "linear_attention": STATE,
    "mamba": STATE,
    "conv": "mix neighbouring tokens, so a token taken out makes neighbours of others",
    "hybrid": STATE,
    "hybrid_sliding": STATE,
    "indexed_attention": INDEX,
    "compressed_sparse_attention": INDEX,
    "heavily_compressed_attention": INDEX,
    "minimax_m3_sparse": INDEX,
    "reference_sliding_attention": "keep a ring buffer that counts on every token being there",
}
"""Types of `config.layer_types` from which tokens cannot be taken out exactly."""


class HybridAdapter(ModelAdapter):
    """Takes models whose decoder is not plain attention throughout, and refuses them by name with the reason.

    Linear attention, state-space and convolution layers fold every token into a state in the order of the sequence.
    Without a token the state of all that follow is another one, a convolution mixes tokens that were not neighbours,
    the left padding of ragged rows enters the state, and there is no KV entry to take a token out of. So what a
    reduction means there is not defined by the paper, and nothing could be proved equal to it.
    """

    name = "hybrid"
    notes = "refused: linear attention (Qwen3-Next, Qwen3.5, MiniCPM-V 4.6), convolutions (LFM2), Mamba, indexers"

    def matches(self, model: nn.Module) -> bool:
        return refusal(getattr(model, "config", None)) is not None

    def text_model(self, model: nn.Module) -> nn.Module:
        raise_if_refused(model)
        return super().text_model(model)


def refusal(config: Any) -> str | None:
    """Why tokens cannot be reduced in the decoder of this config, or None if they can."""
    for part in (config, getattr(config, "text_config", None)):
        types = getattr(part, "layer_types", None) or getattr(part, "layers_block_type", None) or ()
        bad = [i for i, kind in enumerate(types) if kind in REASONS]
        if bad:
            kind = types[bad[0]]
            return f"{len(bad)} of its {len(types)} layers, the first is layer {bad[0]} ({kind}), {REASONS[kind]}"
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
            f"{type(model).__name__} ({config.model_type}) is not supported: {reason}; use a model with plain attention"
        )
