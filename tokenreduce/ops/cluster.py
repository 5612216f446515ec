"""Clustering among few tokens: density peaks with nearest neighbours, and connected components of a similarity graph."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokenreduce.ops.choose import cosine_blocks


def density_peaks(x: Tensor, clusters: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """DPC-KNN (Du et al., 2016): centres (c,) long by falling score, and for each row the place of its centre in that list (n,).

    Density: exp of minus the mean squared distance to the `neighbours` nearest rows, itself included; score: density times the
    distance to the nearest denser row, the largest distance of all for the densest. Distances are divided by √D. Of equal scores
    the earlier row is the centre; published codes add noise there, which decides among equal rows. Holds n² distances: for the
    tokens of a frame or the frames of a video.
    """
    score, distance = peak_scores(x, neighbours)
    centres = score.argsort(descending=True, stable=True)[:clusters]
    nearest = distance[centres].argmin(0)
    nearest[centres] = torch.arange(len(centres), device=x.device)
    return centres, nearest


def peak_scores(x: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """(n,) scores of `density_peaks` and (n, n) distances."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    distance = torch.cdist(x, x) / math.sqrt(x.shape[1])
    near = distance.topk(min(neighbours, len(x)), largest=False).values
    density = (-near.square().mean(-1)).exp()
    denser = density[None, :] > density[:, None]
    to_denser = torch.where(denser, distance, distance.max() if len(x) else 0.0).amin(-1)
    return to_denser * density, distance


def components(u: Tensor, threshold: float) -> Tensor:
    """(n,) long: of directions (n, D), the lowest place of each row's component in the graph cosine > threshold.

    Labels travel along edges and jump to their own label, so rounds grow with the logarithm of the longest chain. Each round goes
    over all pairs block by block: O(n²·D) time, O(n·D) memory.
    """
    label = torch.arange(len(u), device=u.device)
    while True:
        before = label.clone()
        for part, cosine in cosine_blocks(u, u):
            lowest = torch.where(cosine > threshold, label, len(u)).amin(1) if len(u) else label
            found = torch.minimum(label[part], lowest)
            # The label of a label learns it too: whole trees move, not rows.
            label = label.scatter_reduce(0, label[part], found, "amin")
            label[part] = torch.minimum(label[part], found)
        for _ in range(len(u).bit_length()):
            label = label[label]
        if torch.equal(label, before):
            return label


def nearest(u: Tensor, centres: Tensor) -> Tensor:
    """(n,) long: for each direction (n, D) the most similar of centres (c, D), the earlier of equals; block by block."""
    out = torch.zeros(len(u), dtype=torch.long, device=u.device)
    for part, cosine in cosine_blocks(u, centres):
        best = cosine.amax(1, keepdim=True)
        place = torch.arange(len(centres), device=u.device)
        out[part] = torch.where(cosine == best, place, len(centres)).amin(1)
    return out
