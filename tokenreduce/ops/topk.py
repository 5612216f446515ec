"""Choosing the k best of some tokens, deterministically."""

from __future__ import annotations

import torch
from torch import Tensor


def top_mask(scores: Tensor, k: int, candidates: Tensor) -> Tensor:
    """(n,) bool: the `k` candidates of highest score. Ties go to the earlier token; NaN ranks below every number.

    Args:
        scores: (n,) float. k: how many, at most the number of candidates. candidates: (n,) bool.
    """
    # Two stable sorts: by score, then candidates first, so that a candidate of score −inf still beats a non-candidate.
    # NaN sorts as the largest number, hence last among the negated scores.
    order = scores.neg().argsort(stable=True)
    order = order[candidates[order].to(torch.uint8).argsort(descending=True, stable=True)]
    mask = torch.zeros_like(candidates)
    mask[order[:k]] = True
    return mask
