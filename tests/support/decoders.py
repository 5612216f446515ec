"""Tiny seeded decoders, video-like embeddings and layouts, for tests of everything between a strategy and a trace."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tokenreduce.budget import Budget
from tokenreduce.layout import TokenLayout
from tokenreduce.planning.account import Account
from tokenreduce.planning.cost import DecoderShape
from tokenreduce.strategy import Site, StageContext

FIRST = Site(0, "pre_attention")
KINDS = ("static", "noise", "mixed", "drift", "cuts", "zeros")
"""Videos that `embeddings` can look like."""


@cache
def decoder(
    layers: int = 4,
    hidden: int = 32,
    family: str = "qwen2",
    implementation: str = "eager",
    dtype: torch.dtype = torch.float64,
) -> Any:
    """A random decoder with grouped queries, always the same; its weights are large enough for attention to matter."""
    torch.manual_seed(layers)
    config = CONFIG_MAPPING[family](
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).to(dtype).eval()


def embeddings(
    layout: TokenLayout, hidden: int, kind: str, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """(B, N, hidden): vision tokens that repeat (`static`), never do (`noise`), do in half of the slots (`mixed`), change
    slowly (`drift`), change all at once every third frame (`cuts`) or are all zero; text is noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, tokens = layout.shape
    x = normal(rows, tokens, hidden)
    slots, frames, media = int(layout.slot.max()) + 1, int(layout.frame.max()) + 1, int(layout.media().max()) + 1
    if min(slots, frames, media) < 1:
        return x.to(dtype)
    picture = normal(media, 1, slots, hidden).expand(-1, frames, -1, -1)
    moving = normal(media, frames, slots, hidden)
    video = {
        "static": picture,
        "noise": moving,
        "mixed": torch.where(torch.rand(slots, generator=generator)[:, None] < 0.5, picture, moving),
        "drift": picture + 0.3 * moving.cumsum(1),
        "cuts": moving[:, torch.arange(frames) // 3 * 3] + 0.05 * normal(media, frames, slots, hidden),
        "zeros": torch.zeros(media, frames, slots, hidden),
    }[kind]
    seen = video[layout.media().clamp(min=0), layout.frame.clamp(min=0), layout.slot.clamp(min=0)]
    return torch.where(layout.vision[..., None], seen, x).to(dtype)


def account(
    budget: Any, total: int, reducible: int, layers: int = 4, hidden: int = 32, cache_bytes: int = 8
) -> Account:
    """The account of one sequence in `decoder(layers, hidden)`."""
    shape = DecoderShape(
        layers=layers, hidden=hidden, ffn=2 * hidden, heads=4, kv_heads=2, head_dim=hidden // 4, vocab=64
    )
    return Account(None if budget is None else Budget.parse(budget), shape, total, reducible, cache_bytes)


def context(
    hidden: Tensor,
    layout: TokenLayout,
    site: Site = FIRST,
    *,
    allowance: int | None = None,
    depth: int = 4,
    scores: Tensor | None = None,
    size: Tensor | None = None,
) -> StageContext:
    """What a strategy sees of row 0 of `layout`, hidden (n, D), with a fixed answer to `allowance` and `attention`."""
    reducible = layout.reducible()[0]
    count = int(reducible.sum())
    return StageContext(
        site=site,
        depth=depth,
        hidden=hidden,
        slot=layout.slot[0],
        frame=layout.frame[0],
        medium=layout.media()[0],
        position=torch.arange(len(hidden)),
        size=torch.ones(len(hidden), dtype=torch.long) if size is None else size,
        reducible=reducible,
        reducible_count=count,
        original_reducible=count,
        attention_source=None if scores is None else lambda queries, heads: scores,
        allowance_source=None if allowance is None else lambda action: allowance,
    )


def tokens_of(trace: Any) -> list[list[int]]:
    """Tokens that each layer's cache holds, per row."""
    return [list(column) for column in zip(*(layer.tokens.tolist() for layer in trace.layers), strict=True)]


def mean_share(counts: Sequence[int], total: int) -> float:
    """C: mean of the layers' counts over the input length."""
    return sum(counts) / (len(counts) * total)
