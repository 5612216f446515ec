"""Segments of a video: from similarities of neighbouring frames, clusters of frames, or slots that stand still.

All return lengths or numbers of the host, for at most a few hundred frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor


def cut_segments(similarity: Sequence[float], threshold: float, lowest: int) -> list[int]:
    """Lengths of segments: a cut after frame t where similarity[t] to frame t + 1 is below `threshold` or among the `lowest`
    lowest.

    similarity: (F − 1,). Of equal similarities the earlier counts as lower.
    """
    order = sorted(range(len(similarity)), key=lambda t: similarity[t])
    cuts = set(order[:lowest]) | {t for t, value in enumerate(similarity) if value < threshold}
    return _lengths(cuts, len(similarity) + 1)


def completed_segments(similarity: Sequence[float], threshold: float, least: int) -> list[int]:
    """As `cut_segments` by `threshold`; while that makes fewer than `least` segments, the lowest of the rest are cut as well."""
    cuts = {t for t, value in enumerate(similarity) if value < threshold}
    rest = sorted((t for t in range(len(similarity)) if t not in cuts), key=lambda t: similarity[t])
    cuts |= set(rest[: max(least - 1 - len(cuts), 0)])
    return _lengths(cuts, len(similarity) + 1)


def _lengths(cuts: set[int], frames: int) -> list[int]:
    ends = [-1, *sorted(cuts), frames - 1]
    return [after - before for before, after in pairwise(ends)]


def windows_of_clusters(labels: Sequence[int]) -> list[int]:
    """Lengths of windows from a cluster of each frame (PruneVid): every cluster keeps its longest runs, single frames never.

    Any other run joins the longer of the runs kept before and after it, the one before where they are equal. Nothing kept: one
    window.
    """
    runs: list[list[int]] = []
    start = 0
    for label, frames in groupby(labels):
        length = len(list(frames))
        runs.append([start, length, label])
        start += length
    longest: dict[int, int] = {}
    for _, length, label in runs:
        longest[label] = max(longest.get(label, 0), length)
    kept = [number for number, (_, length, label) in enumerate(runs) if length > 1 and length == longest[label]]
    if not kept:
        return [len(labels)] if len(labels) else []
    owner = []
    for number in range(len(runs)):
        left = max((k for k in kept if k <= number), default=kept[0])
        right = min((k for k in kept if k >= number), default=left)
        owner.append(left if runs[left][1] >= runs[right][1] else right)
    lengths: dict[int, int] = {}
    for (_, length, _), own in zip(runs, owner, strict=True):
        lengths[own] = lengths.get(own, 0) + length
    return [lengths[own] for own in kept]


def static_windows(still: Tensor, longest: int) -> list[int]:
    """Lengths of the windows that save most tokens when still slots are kept once (HoliTom §3.2), by dynamic programming.

    still: (F − 1, S) bool, a slot stands still from frame t to t + 1. A window of w frames, at most `longest`, saves w − 1 times
    the slots that are still all through it. A window must save strictly more than leaving its first frame alone. O(F·longest·S).
    """
    frames = still.shape[0] + 1
    saved = [[0] * (frames + 1) for _ in range(frames)]
    for start in range(frames):
        through = torch.ones_like(still[0]) if frames > 1 else still.new_ones(0)
        counts = []
        for end in range(start + 1, min(start + longest, frames)):
            through = through & still[end - 1]
            counts.append(through.sum())
        for offset, count in enumerate(torch.stack(counts).tolist() if counts else []):
            saved[start][start + 1 + offset] = count * (offset + 1)
    best, width = [0] * (frames + 1), [1] * frames
    for start in range(frames - 1, -1, -1):
        best[start] = best[start + 1]
        for end in range(start + 1, min(start + longest, frames)):
            value = saved[start][end] + best[end + 1]
            if value > best[start]:
                best[start], width[start] = value, end - start + 1
    lengths, start = [], 0
    while start < frames:
        lengths.append(width[start])
        start += width[start]
    return lengths
