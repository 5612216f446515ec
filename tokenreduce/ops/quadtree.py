"""A quadtree over the grids of a video's frames, and the union of its nodes from frame to frame.

Paper: Hyun et al., STTM (ICCV 2025), §3.
A level halves the one below: pairs of rows and columns, where a side is odd its first row or column alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.ops.choose import directions


@dataclass
class Level:
    """One level of the pyramid. value: (T, h, w, D) means of means. here: (T, h, w) bool, has any token.

    row, column: (H,), (W,) long, the node over each row and column of the full grid. weight: (T, H, W), what each token counts in
    its node.
    """

    value: Tensor
    here: Tensor
    row: Tensor
    column: Tensor
    weight: Tensor


def pyramid(x: Tensor, here: Tensor) -> list[Level]:
    """Levels from the full grid x (T, H, W, D), here (T, H, W) bool, up to the first with a side of two or less."""
    rows, columns = (torch.arange(side, device=x.device) for side in here.shape[1:])
    levels = [Level(x, here, rows, columns, here.to(x.dtype))]
    while min(levels[-1].here.shape[1:]) > 2:
        last = levels[-1]
        up, left = (_parents(side, x.device) for side in last.here.shape[1:])
        count = _summed(last.here.to(x.dtype)[..., None], up, left)
        value = _summed(torch.where(last.here[..., None], last.value, 0), up, left) / count.clamp(min=1)
        row, column = up[last.row], left[last.column]
        share = 1 / count[..., 0].clamp(min=1)
        levels.append(Level(value, count[..., 0] > 0, row, column, last.weight * share[:, row][:, :, column]))
    return levels


def nodes(levels: list[Level], root: int, threshold: float, released: bool) -> Tensor:
    """(T, H, W) long: the level whose node each token ends in. Level `root` counts from the coarsest.

    A node stays whole if its cosine to each of its children reaches `threshold`. released: a node with fewer than four children
    must resemble the first token of its frame at the children's level as well, as in the public code.
    """
    start = max(len(levels) - 1 - root, 0)
    found = torch.full_like(levels[0].here, start, dtype=torch.long)
    open_ = torch.ones_like(levels[start].here)
    for number in range(start, 0, -1):
        node, child = levels[number], levels[number - 1]
        up, left = (_parents(side, found.device) for side in child.here.shape[1:])
        own = directions(node.value)
        cosine = (own[:, up][:, :, left] * directions(child.value)).sum(-1)
        split = _summed((child.here & (cosine < threshold)).to(own.dtype)[..., None], up, left)[..., 0] > 0
        if released:
            few = _summed(torch.ones_like(child.here).to(own.dtype)[..., None], up, left)[..., 0] < 4
            split |= few & ((own * directions(child.value[:, :1, :1])).sum(-1) < threshold)
        split &= open_
        inside = split[:, node.row][:, :, node.column]
        found = torch.where(inside, number - 1, found)
        open_ = split[:, up][:, :, left]
    return found


def united(first: Tensor, second: Tensor, count: int) -> Tensor:
    """(count,) long: the lowest number that each of `count` nodes hangs together with by edges first–second, (E,) long each."""
    label = torch.arange(count, device=first.device)
    while True:
        before = label
        lowest = torch.minimum(label[first], label[second])
        for end in (first, second):
            label = label.scatter_reduce(0, label[end], lowest, "amin").scatter_reduce(0, end, lowest, "amin")
        for _ in range(count.bit_length()):
            label = label[label]
        if torch.equal(label, before):
            return label


def _parents(side: int, device: torch.device) -> Tensor:
    """(side,) long: the parent of each row or column."""
    return (torch.arange(side, device=device) + side % 2) // 2


def _summed(x: Tensor, up: Tensor, left: Tensor) -> Tensor:
    """(T, h', w', D): sums of x (T, h, w, D) over the children of each node."""
    rows = x.new_zeros(len(x), int(up[-1]) + 1, *x.shape[2:]).index_add_(1, up, x)
    return x.new_zeros(*rows.shape[:2], int(left[-1]) + 1, x.shape[-1]).index_add_(2, left, rows)
