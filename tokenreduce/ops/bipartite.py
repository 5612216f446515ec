"""Bipartite soft matching: merging by edges between two halves of the tokens, without comparing all with all.

Paper: Bolya et al., Token Merging: Your ViT But Faster (2023, arXiv 2210.09461), §3. Cost N²/4 products per frame.
"""

from __future__ import annotations

import torch
from torch import Tensor

ENTRIES = 1 << 24
"""Similarities held at once: bounds the memory to 64 MiB, whatever the number of frames."""


def bipartite_target(hidden: Tensor, movable: Tensor, merges: int) -> Tensor:
    """(F, n) long merge target: in each frame, `merges` of the tokens go into the most similar token of the other half.

    Movable tokens are dealt out in turn: the first, third, … are sources and may go; the others receive. The sources whose best
    cosine is highest go; ties go to the earlier source and the earlier receiver. Zero and non-finite vectors go last.

    Args:
        hidden: (F, n, D) floating. movable: (n,) bool, the same in every frame. merges: at most the number of sources.
    """
    frames, n, _ = hidden.shape
    index = movable.nonzero().squeeze(1)
    source, receiver = index[::2], index[1::2]
    target = torch.arange(n, device=hidden.device).repeat(frames, 1)
    if merges == 0:
        return target
    block = max(ENTRIES // max(len(source) * len(receiver), 1), 1)
    for start in range(0, frames, block):
        part = _directions(hidden[start : start + block])
        best, whom = (part[:, source] @ part[:, receiver].mT).nan_to_num(-torch.inf).max(-1)
        going = best.argsort(dim=1, descending=True, stable=True)[:, :merges]
        target[start : start + block].scatter_(1, source[going], receiver[whom.gather(1, going)])
    return target


def _directions(hidden: Tensor) -> Tensor:
    """`hidden` (F, n, D) at length 1, in at least float32; NaN where a vector is zero or not finite."""
    exact = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    # Scaled to a largest entry of 1 first: the squares of large vectors overflow.
    exact = exact / exact.abs().amax(-1, keepdim=True)
    directions: Tensor = exact / exact.norm(dim=-1, keepdim=True)
    return directions
