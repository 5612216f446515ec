"""Rows and column sums of the causal softmax matrix, recomputed from queries and keys. Never an N×N matrix.

All take one sequence: q (H, n, d) and k (G, m, d) after rotary embedding, H a multiple of G (grouped queries), m ≥ n, the
last n keys belonging to the n queries. They return float32, or float64 for float64 input.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 21
"""Scores held at once: 8 MiB of float32, which stay in the cache."""


def importance(q: Tensor, k: Tensor, scale: float, queries: int, heads: str = "mean") -> Tensor:
    """(m,) attention each key receives from the last `queries` queries, summed over them, then mean or max over heads.

    queries = 1 is the last row (the released FrameFusion, FastV); queries = n the cumulative importance of FrameFusion §3.1.
    """
    total_heads, n, width = q.shape
    groups, m, _ = k.shape
    share = total_heads // groups
    exact = torch.promote_types(q.dtype, torch.float32)
    grouped = q.view(groups, share, n, width)
    transposed = k.transpose(-1, -2)
    sums = torch.zeros(groups, share, m, dtype=exact, device=q.device)
    block = max(1, min(queries, BLOCK_ELEMENTS // max(total_heads * m, 1)))
    for first in range(n - queries, n, block):
        last = min(first + block, n)
        seen = m - n + last
        rows = grouped[:, :, first:last].reshape(groups, share * (last - first), width)
        scores = (
            torch.matmul(rows, transposed[..., :seen]).to(exact).mul_(scale).view(groups, share, last - first, seen)
        )
        future = torch.ones(last - first, last - first, dtype=torch.bool, device=q.device).triu_(1)
        scores[..., seen - (last - first) :].masked_fill_(future, -torch.inf)
        sums[..., :seen] += scores.softmax(-1).sum(2)
    return sums.amax((0, 1)) if heads == "max" else sums.mean((0, 1))


def importance_flops(heads: int, width: int, n: int, m: int, queries: int) -> int:
    """Multiply-adds × 2 that `importance` spends on scores (the softmax is not counted)."""
    block = max(1, min(queries, BLOCK_ELEMENTS // max(heads * m, 1)))
    total = 0
    for first in range(n - queries, n, block):
        last = min(first + block, n)
        total += 2 * heads * width * (last - first) * (m - n + last)
    return total
