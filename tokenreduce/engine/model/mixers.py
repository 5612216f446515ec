"""Decoders whose layers are not all attention: which kinds can be reduced, and at which sites.

From the site of a reduction on, the sequence is the shorter one: linear-attention, state-space and convolution layers run
over the tokens that are left, in order, and their states are what those tokens make.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenreduce.errors import UnsupportedError
from tokenreduce.planning.schedule import attention_sources
from tokenreduce.plugin_checks import sites_of
from tokenreduce.strategy import Strategy

KINDS = {"full_attention", "sliding_attention", "linear_attention", "mamba", "conv", "moe", "mlp", "attention"}
"""Entries of `config.layer_types` whose layers follow reduced tokens."""


def refuse_model(family: str, config: Any) -> None:
    """Refuse decoders with layers that do not follow reduced tokens, or with attention that is not causal."""
    if not getattr(config, "is_causal", True):
        raise UnsupportedError(f"{family}: its tokens see those behind them (is_causal=False), which is not supported")
    kinds = set(getattr(config, "layer_types", None) or ()) - KINDS
    if kinds:
        raise UnsupportedError(
            f"{family}: its decoder has {', '.join(sorted(kinds))} layers, which is not supported: they would not see the "
            "tokens that are left as they should"
        )


def refuse_sites(family: str, without: Mapping[int, str], strategies: Sequence[Strategy], depth: int) -> None:
    """Refuse stages at the KV cache of a layer that has none, and those that read attention before any layer has it.

    without: layers without attention."""
    if not without:
        return
    attention = [layer for layer in range(depth) if layer not in without]
    where = f"its attention layers are {', '.join(map(str, attention)) or 'none'}"
    for strategy in strategies:
        for site in sites_of(strategy, depth):
            if site.kind in ("kv", "cache", "decode") and site.layer in without:
                raise UnsupportedError(
                    f"{family}: {strategy.name} acts on the KV cache of layer {site.layer}, which has no attention and so no "
                    f"keys and values; {where}: list those in `at`"
                )
            own = strategy.capabilities.own_attention and site.kind == "pre_attention"
            if own and site.layer in without:
                raise UnsupportedError(
                    f"{family}: {strategy.name} looks at the attention of layer {site.layer} ahead of it, which has none; {where}"
                )
            if (
                strategy.reads(site)
                and site.kind not in ("kv", "decode")
                and not own
                and not attention_sources([site.order], without)
            ):
                raise UnsupportedError(
                    f"{family}: {strategy.name} reads attention at {site}, before any layer of attention has run; {where}"
                )
