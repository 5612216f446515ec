"""Similarity of each token to the same spot of the frame before, and the runs it makes.

Paper: FrameFusion §3.1 (Eq. 1) and §4.1. Cost 3·N·D (Eq. 6): one row per token, never an N×N matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenreduce.ops.blocks import block_rows


def previous_in_slot(slot: Tensor, medium: Tensor, candidates: Tensor) -> Tensor:
    """(n,) long: for each candidate, the candidate before it with the same slot of the same medium; −1 where there is none.

    Args:
        slot, medium: (n,) long. candidates: (n,) bool; the others get −1 and are nobody's predecessor.
    """
    previous = torch.full_like(slot, -1)
    if len(slot) < 2:
        return previous
    key = torch.where(candidates, medium * (slot.max() + 1) + slot, -1)
    order = key.argsort(stable=True)
    key = key[order]
    same = (key[1:] == key[:-1]) & (key[1:] >= 0)
    previous[order[1:]] = torch.where(same, order[:-1], -1)
    return previous


@torch.no_grad()
def cosine_to(hidden: Tensor, other: Tensor) -> Tensor:
    """(n,) float32 (float64 for float64 input): cosine of each row with row `other[i]`; −inf where `other` is −1.

    A zero or non-finite vector is similar to nothing: −inf, never NaN.

    Args:
        hidden: (n, D) floating. other: (n,) long.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    result = torch.full(other.shape, -torch.inf, dtype=dtype, device=hidden.device)
    # All rows, those without another too: which they are, the host need not know.
    for start in range(0, len(hidden), block_rows(hidden)):
        part = slice(start, start + block_rows(hidden))
        whom = other[part]
        a, b = hidden[part].to(dtype, copy=True), hidden[whom.clamp(min=0)].to(dtype)
        # Scaled to a largest entry of 1 first: the squares of large rows overflow, those of tiny rows vanish.
        for x in (a, b):
            x.div_(x.abs().amax(-1, keepdim=True))
        norms = a.norm(dim=-1) * b.norm(dim=-1)
        cosine = a.mul_(b).sum(-1) / norms
        result[part] = torch.where(cosine.isnan() | (whom < 0), -torch.inf, cosine)
    return result


def within_span(frame: Tensor, previous: Tensor, similar: Tensor, frames: int) -> Tensor:
    """(n,) bool: `similar`, but no run goes over a frame whose number is a multiple of `frames`: it begins anew there.

    So every run lies in one span of `frames` frames, as pictures of a coded video do between key frames, and which tokens
    are linked is decided token by token.

    Args:
        frame: (n,) long, not negative where similar. previous: (n,) long from `previous_in_slot`. similar: (n,) bool.
    """
    return similar & (frame // frames == frame[previous.clamp(min=0)] // frames)


def merge_runs(previous: Tensor, similar: Tensor) -> Tensor:
    """(n,) long merge target: tokens chained by `similar` all go to the first of their run; the others stay.

    Args:
        previous: (n,) long from `previous_in_slot`. similar: (n,) bool, token merges with its previous one.
    """
    target = torch.arange(len(previous), device=previous.device)
    linked = similar & (previous >= 0)
    target = torch.where(linked, previous, target)
    # Doubling: after k rounds every pointer has jumped 2^k links back, so log2(longest run) rounds suffice.
    for _ in range(max(len(previous), 1).bit_length()):
        target = target[target]
    return target
