"""Decoders without vision."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokenreduce.adapter import FfnPair, ModelAdapter
from tokenreduce.errors import UnsupportedError
from tokenreduce_adapters.hybrid import refusal

SERVED = {"full_attention", "sliding_attention", "attention", "linear_attention", "mamba", "conv", "moe", "mlp"}
"""Layer types that follow reduced tokens: attention, states of the tokens that are left, and experts alone."""

PAIRS = (
    ("pre_feedforward_layernorm", "post_feedforward_layernorm"),  # Gemma-2, Gemma-3
    ("mlp", "post_feedforward_layernorm"),  # OLMo-2, OLMo-3, EXAONE-4: the MLP reads the stream, its output is normed
    ("post_attention_layernorm", "post_mlp_layernorm"),  # GLM-4
    ("pre_feedforward_layernorm", "mlp"),  # VaultGemma
    ("feedforward_layernorm", "mlp"),  # Apertus
    ("ffn_norm", "feed_forward"),  # LFM2
    ("pre_ff_layernorm", "feed_forward"),  # Bamba
    ("post_attention_layernorm", "mlp"),  # nearly all others
)
"""Names of (entry, exit) around the FFN; the first pair that a layer has is its own."""


class DecoderAdapter(ModelAdapter):
    """A text decoder (Qwen, Llama, Mistral, Phi-3, Gemma …), bare or with its head, fed with embeddings and a layout.

    It has no image ids, so `layout` is None and the caller passes one: `tr.reduce(model, pipeline, layout=...)`.
    Layers that run attention and FFN side by side (Cohere, Phi-2, GPT-NeoX) have no point between them: no pair.
    Granite scales the FFN's output outside any module, so no pair fits, and the probe at attach time refuses it.
    """

    name = "decoder"
    checkpoints = ("Qwen/Qwen2-7B-Instruct", "Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.3")
    notes = "any text decoder with a `layers` list; needs layout=TokenLayout(...), as it has no image tokens of its own"

    def matches(self, model: nn.Module) -> bool:
        config: Any = getattr(model, "config", None)
        other = any(hasattr(config, part) for part in ("vision_config", "audio_config", "text_config"))
        if config is None or other or getattr(config, "is_encoder_decoder", False) or refusal(config):
            return False
        types = getattr(config, "layer_types", None) or ()
        plain = set(types) <= SERVED
        layers = getattr(_base(model), "layers", None)
        return plain and isinstance(layers, nn.ModuleList) and len(layers) > 0 and any(map(_is_causal, layers))

    def text_model(self, model: nn.Module) -> nn.Module:
        base = _base(model)
        if isinstance(getattr(base, "layers", None), nn.ModuleList):
            return base
        raise UnsupportedError(f"{type(model).__name__}: no decoder with a `layers` list was found")

    def ffn_pair(self, layer: nn.Module) -> FfnPair | None:
        return ffn_pair(layer)


def ffn_pair(layer: nn.Module) -> FfnPair | None:
    """The pair of PAIRS that `layer` has; None where attention and FFN run side by side."""
    if getattr(layer, "use_parallel_residual", False):
        return None
    for names in PAIRS:
        entry, exit_ = (getattr(layer, name, None) for name in names)
        if isinstance(entry, nn.Module) and isinstance(exit_, nn.Module):
            return FfnPair(entry, exit_)
    return None


def _base(model: nn.Module) -> nn.Module:
    """The model without its head."""
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def _is_causal(layer: nn.Module) -> bool:
    return any(bool(getattr(module, "is_causal", False)) for module in layer.children())
