"""Rows and column sums of the causal softmax matrix, recomputed from queries and keys. Never an N×N matrix.

All take one sequence: q (H, n, d) and k (G, m, d) after rotary embedding, H a multiple of G (grouped queries), m ≥ n, the
last n keys belonging to the n queries. They return float32, or float64 for float64 input.
"""

from __future__ import annotations

import functools
import math
import warnings
from types import ModuleType

import torch
from torch import Tensor

from tokenreduce.ops.blocks import LARGER, query_block

TILE_QUERIES, TILE_ELEMENTS = 64, 1 << 20
"""Queries, and scores of one group of heads, in a tile where the rows' log-sum-exp is known."""


@torch.no_grad()
def importance(
    q: Tensor, k: Tensor, scale: float, queries: int, heads: str = "mean", lse: Tensor | None = None
) -> Tensor:
    """(m,) attention each key receives from the last `queries` queries, summed over them, then mean or max over heads.

    queries = 1 is the last row (the released FrameFusion, FastV); queries = n the cumulative importance of FrameFusion §3.1.
    lse: (H, n) log-sum-exp of each query's scores, where the attention has computed it: then no row needs to be whole.
    Beyond its result it holds one block of scores, O(H·m). Has no gradient.
    """
    sums = _gpu_sums(q, k, scale, queries) if q.is_cuda and queries > 1 else None
    if sums is None:
        sums = column_sums(q, k, scale, queries, lse)
    return sums.amax(0) if heads == "max" else sums.mean(0)


def column_sums(q: Tensor, k: Tensor, scale: float, queries: int, lse: Tensor | None = None) -> Tensor:
    """(H, m) `importance` of each head, in plain torch; the oracle of the GPU kernel.

    In half precision the scores are computed in float32: that is as exact as the attention kernels, and without special
    hardware also many times faster than a product of bfloat16.
    """
    total_heads, n, width = q.shape
    groups, m, _ = k.shape
    share = total_heads // groups
    exact = torch.promote_types(q.dtype, torch.float32)
    block, tile = query_block(total_heads, m, queries), m
    if q.device.type != "cpu":  # Blocks that fit a CPU's cache would be thousands of launches.
        block = min(queries, block * LARGER)
    if lse is not None:
        block = min(queries, TILE_QUERIES)
        tile = min(m, max(1, TILE_ELEMENTS // (share * block)))
    grouped = q.view(groups, share, n, width)
    # exp2 is twice as fast as exp.
    unit = scale if lse is None else scale * math.log2(math.e)
    shift = None if lse is None else (lse.to(exact) * math.log2(math.e)).view(groups, share, n)
    sums = torch.zeros(groups, share, m, dtype=exact, device=q.device)
    buffer = torch.empty(share * block * tile, dtype=exact, device=q.device)
    future = torch.ones(block, block, dtype=torch.bool, device=q.device).triu_(1)
    for group in range(groups):
        keys = k[group].to(exact).T
        for first in range(n - queries, n, block):
            last = min(first + block, n)
            count, before = last - first, m - n + first
            rows = grouped[group, :, first:last].reshape(share * count, width).to(exact) * unit
            for left in range(0, before + count, tile):
                right = min(left + tile, before + count)
                held = buffer[: len(rows) * (right - left)].view(len(rows), right - left)
                scores = held.view(share, count, right - left)
                if shift is None:
                    torch.mm(rows, keys[:, left:right], out=held)
                else:
                    known = shift[group, :, first:last].reshape(-1, 1).expand_as(held)
                    torch.addmm(known, rows, keys[:, left:right], beta=-1, out=held)
                if right > before:
                    start = max(left, before)
                    hidden = future[:count, start - before : right - before]
                    scores[..., start - left :].masked_fill_(hidden, -torch.inf)
                if shift is None:
                    torch.softmax(held, -1, out=held)
                else:
                    held.exp2_()
                sums[group, :, left:right] += scores.sum(1)
    return sums.view(total_heads, m)


@torch.no_grad()
def attention_rows(
    q: Tensor, k: Tensor, scale: float, places: Tensor, heads: str = "mean", rows: str = "sum"
) -> Tensor:
    """Attention that each key receives from the queries at `places` (r,) long among the n, in any order, in one pass.

    rows: `sum` or `max` over the r queries, or `each`; then heads: `mean`, `max` or `each`. The result is (m,), with `each`
    preceded by its own axis: (H, m), (r, m) or (H, r, m). Beyond its result it holds one block of scores. Has no gradient.
    """
    total_heads, n, width = q.shape
    groups, m, _ = k.shape
    share = total_heads // groups
    exact = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(exact).transpose(1, 2)
    key_place = torch.arange(m, device=q.device)
    block = query_block(total_heads, m, max(len(places), 1))
    parts: list[Tensor] = []
    total = torch.zeros(total_heads, m, dtype=exact, device=q.device)
    for some in places.split(block) if len(places) else ():
        chosen = q[:, some].to(exact) * scale
        scores = chosen.reshape(groups, share * len(some), width) @ keys
        scores = scores.view(total_heads, len(some), m)
        scores.masked_fill_(key_place > (some + m - n)[:, None], -torch.inf)
        seen = scores.softmax(-1)
        if rows == "each":
            parts.append(_over_heads(seen, heads))
        elif rows == "max":
            total = torch.maximum(total, seen.amax(1))
        else:
            total += seen.sum(1)
    if rows != "each":
        return _over_heads(total, heads)
    return torch.cat(parts, -2) if parts else _over_heads(total[:, None][:, :0], heads)


def _over_heads(scores: Tensor, heads: str) -> Tensor:
    """(…) of scores (H, …)."""
    return scores if heads == "each" else scores.amax(0) if heads == "max" else scores.mean(0)


@functools.cache
def _kernels() -> ModuleType | None:
    """The Triton kernels, None where Triton is not installed."""
    try:
        from tokenreduce.ops import attention_triton
    except ImportError:
        return None
    return attention_triton


_failed: dict[int, object] = {}
"""Kernels that have failed once: to try them anew at every reading would cost a compilation each."""


def _gpu_sums(q: Tensor, k: Tensor, scale: float, queries: int) -> Tensor | None:
    """`column_sums` by the Triton kernels; None, after a warning, where they do not run: then plain torch has to do."""
    kernels = _kernels()
    if kernels is None or q.dtype not in kernels.DTYPES or q.shape[-1] > kernels.MAX_WIDTH:
        return None
    if id(kernels) in _failed:
        return None
    try:
        return kernels.gpu_column_sums(q, k, scale, queries)  # type: ignore[no-any-return]
    except Exception as error:
        _failed[id(kernels)] = kernels  # Kept, so that its id is nobody else's.
        warnings.warn(f"importance is computed in plain torch: its GPU kernel failed: {error!r}", stacklevel=2)
        return None
