"""Choosing tokens that are unlike each other or cover the rest, greedily. No seed: ties go to the earlier token.

All take directions or features (n, D) and hold O(n·D), never an n×n matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenreduce.ops.blocks import block_rows


def directions(x: Tensor) -> Tensor:
    """(…, D) rows at length 1, in at least float32; zeros where a row is zero or not finite: it is similar to nothing."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    # Scaled to a largest entry of 1 first: the squares of large rows overflow.
    exact = exact / exact.abs().amax(-1, keepdim=True)
    unit: Tensor = (exact / exact.norm(dim=-1, keepdim=True)).nan_to_num(0.0, 0.0, 0.0)
    return unit


def earliest(values: Tensor) -> Tensor:
    """() long: place of the largest of values (n,), the first where several are; NaN counts as −inf."""
    values = values.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    place = torch.arange(len(values), device=values.device)
    return torch.where(values == values.amax(), place, len(values)).amin()


def cosine_blocks(rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows @ columns.T for directions (n, D) and (m, D), with the slice of rows that they belong to."""
    block = max(block_rows(columns.T), 1)
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        yield part, rows[part] @ columns.T


def nearest_other(u: Tensor) -> Tensor:
    """(n,) cosine of each direction (n, D) to the most similar other one; −inf for a single one. O(n²·D) time, block by block."""
    out = u.new_full((len(u),), -torch.inf)
    for part, cosine in cosine_blocks(u, u):
        own = torch.arange(part.start, part.start + len(cosine), device=u.device)
        cosine[own - part.start, own] = -torch.inf
        out[part] = cosine.amax(1)
    return out


def max_min(u: Tensor, count: int, first: Tensor | None = None) -> Tensor:
    """(count,) long: directions (n, D) in the order of a greedy choice, each the farthest in cosine from those chosen before.

    DivPrune's rule (Alvar et al., 2025, §3.2): the first is the one whose nearest neighbour is farthest, or `first`, () long.
    With a running minimum: O(n·count·D) after the first.
    """
    order = torch.zeros(count, dtype=torch.long, device=u.device)
    if not count:
        return order
    chosen = earliest(-nearest_other(u)) if first is None else first
    closest = u.new_full((len(u),), -torch.inf)
    taken = torch.zeros(len(u), dtype=torch.bool, device=u.device)
    for step in range(count):
        if step:
            chosen = earliest(torch.where(taken, -torch.inf, -closest))
        order[step] = chosen
        taken[chosen] = True
        closest = torch.maximum(closest, u @ u[chosen])
    return order


def dpp(u: Tensor, quality: Tensor, count: int) -> Tensor:
    """(count,) long: greedy MAP of the determinantal point process with kernel quality_i · cos_ij · quality_j.

    Chen et al., Fast Greedy MAP Inference (2018), Algorithm 1. u: (n, D) directions; quality: (n,) float. Where the kernel's rank
    is used up, the rest follows by what is left of each token's own entry, then by place. O(n·count·(D + count)) time.
    """
    n = len(u)
    left = quality.square() * u.square().sum(-1)
    floor = torch.finfo(u.dtype).eps * left.amax() if n else left.sum()
    rows = u.new_zeros(count, n)
    order = torch.zeros(count, dtype=torch.long, device=u.device)
    taken = torch.zeros(n, dtype=torch.bool, device=u.device)
    for step in range(count):
        chosen = earliest(torch.where(taken, -torch.inf, left))
        order[step] = chosen
        taken[chosen] = True
        kernel = quality[chosen] * (u @ u[chosen]) * quality
        row = (kernel - rows[:step, chosen] @ rows[:step]) / left[chosen].clamp(min=0).sqrt()
        rows[step] = torch.where(left[chosen] > floor, row, 0)
        left = left - rows[step].square()
    return order
