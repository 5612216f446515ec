"""The operators that stand for the engine in a compiled graph. They act on the forward that runs in the calling thread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenreduce.engine.cache.layers import running
from tokenreduce.errors import UnsupportedError

# They call Python, so that a recorded CUDA graph must not replay them.
_TAGS = (torch.Tag.cudagraph_unsafe,)


def _forward() -> Any:
    forward = running.forward
    if not hasattr(forward, "run_visit"):
        raise UnsupportedError("a graph compiled with a pipeline attached runs without one; compile the model anew")
    return forward


@torch.library.custom_op("tokenreduce::visit", mutates_args=(), tags=_TAGS)
def visit(
    x: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    valid: Tensor | None,
    scale: float,
    layer: int,
    phase: int,
    counts: list[int],
    draft: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, n, D) after the stages of a site have acted, the input columns of its tokens (B, m) and which are not padding.

    The attention that they may read: query (B, H, q, d), key (B, G, k, d), valid (B, k) bool. counts: tokens left in each row.
    """
    out, index, there = _forward().run_visit(x, query, key, valid, scale, layer, phase, counts)
    shape = (x.shape[0], max(counts) + draft)
    return (
        x.clone() if out is None else out,
        x.new_zeros(shape, dtype=torch.long) if index is None else index.clone(),
        x.new_ones(shape, dtype=torch.bool) if there is None else there.clone(),
    )


@visit.register_fake
def _(x: Any, query: Any, key: Any, valid: Any, scale: Any, layer: Any, phase: Any, counts: Any, draft: Any) -> Any:
    width = counts[0]
    for count in counts[1:]:
        width = max(width, count)
    shape = (x.shape[0], width + draft)
    return x.new_empty(*shape, x.shape[2]), x.new_empty(shape, dtype=torch.long), x.new_empty(shape, dtype=torch.bool)


@torch.library.custom_op("tokenreduce::reduced_attention", mutates_args=(), tags=_TAGS)
def reduced_attention(
    x: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    layer: int,
) -> Tensor:
    """(B, q, H, d) attention of a layer whose cache is reduced; the keys and values of the new tokens go into it here."""
    return _forward().run_attention(x, query, key, value, mask, scale, layer).contiguous()  # type: ignore[no-any-return]


@reduced_attention.register_fake
def _(x: Any, query: Any, key: Any, value: Any, mask: Any, scale: Any, layer: Any) -> Any:
    rows, heads, count, _ = query.shape
    return query.new_empty(rows, count, heads, value.shape[-1])


@torch.library.custom_op("tokenreduce::add_deepstack", mutates_args=(), tags=_TAGS)
def add_deepstack(out: Tensor, layer: int) -> Tensor:
    """The output of a layer (B, n, D) with its deepstack rows added."""
    return _forward().run_deepstack(out, layer)  # type: ignore[no-any-return]


@add_deepstack.register_fake
def _(out: Any, layer: Any) -> Any:
    return torch.empty_like(out)
