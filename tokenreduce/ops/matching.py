"""A round of bipartite matching over an ordered list, as ToMe, AIM and VisPruner take it: the list is re-ordered by each round.

Paper: Bolya et al., Token Merging (2023), §3. For lists that lie in one frame: n²/4 products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Round(NamedTuple):
    """gone, into: (r,) long, rows that go and the row that each resembles most. stay: (n − r,) long, the list after the round:
    even rows that are left by falling similarity, then odd rows."""

    gone: Tensor
    into: Tensor
    stay: Tensor


def matching_round(u: Tensor, merges: int) -> Round:
    """The `merges` even rows of directions (n, D) that resemble an odd row most go, at most all even rows that have a partner."""
    even, odd = torch.arange(0, len(u), 2, device=u.device), torch.arange(1, len(u), 2, device=u.device)
    merges = min(merges, len(odd))
    if merges == 0:
        return Round(even[:0], even[:0], torch.arange(len(u), device=u.device))
    best, whom = (u[even] @ u[odd].T).max(1)
    order = best.argsort(descending=True, stable=True)
    return Round(even[order[:merges]], odd[whom[order[:merges]]], torch.cat([even[order[merges:]], odd]))
