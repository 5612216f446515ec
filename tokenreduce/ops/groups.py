"""Groups of tokens (frames, media, segments), exact shares among them, and the best of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """n tokens in g groups.

    index: (n,) long, the group of each token, −1 for tokens in none. count: g.
    """

    index: Tensor
    count: int

    def __len__(self) -> int:
        return self.count

    @cached_property
    def sizes(self) -> Tensor:
        """(g,) long: tokens in each group."""
        return self.sums(torch.ones_like(self.index))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The same as numbers of the host."""
        return tuple(self.sizes.tolist())

    def sums(self, values: Tensor) -> Tensor:
        """(g, …): sums of values (n, …) over the tokens of each group, in at least float32 where they are not whole numbers."""
        inside = self.index >= 0
        if values.is_floating_point():
            values = values.to(torch.promote_types(values.dtype, torch.float32))
        out = values.new_zeros(self.count, *values.shape[1:])
        return out.index_add_(0, self.index[inside], values[inside])

    def means(self, values: Tensor) -> Tensor:
        """(g, …) float: means of values (n, …)."""
        sizes = self.sizes.clamp(min=1).view(-1, *[1] * (values.dim() - 1))
        sums = self.sums(values)
        return sums / sizes.to(sums.dtype if sums.is_floating_point() else torch.float32)

    def first(self, values: Tensor) -> Tensor:
        """(g, …): the value of the first token of each group, which none is without."""
        place = torch.arange(len(self.index), device=self.index.device)
        inside = self.index >= 0
        first = torch.full((self.count,), len(self.index), device=place.device)
        first = first.scatter_reduce_(0, self.index[inside], place[inside], "amin")
        return values[first]

    def spread(self, values: Tensor) -> Tensor:
        """(n, …): to each token the value (g, …) of its group; to tokens in none that of the first."""
        return values[self.index.clamp(min=0)]

    def mask(self, group: int) -> Tensor:
        """(n,) bool: tokens of one group."""
        return self.index == group


def grouped(key: Tensor, inside: Tensor) -> Groups:
    """Tokens of equal `key` (n,) long are one group, numbered by their first token; only those `inside` (n,) bool."""
    _, index = key[inside].unique(return_inverse=True)
    count = int(index.max()) + 1 if len(index) else 0
    place = torch.arange(len(index), device=key.device)
    first = torch.full((count,), len(index), device=key.device).scatter_reduce_(0, index, place, "amin")
    rank = torch.empty_like(first)
    rank[first.argsort()] = torch.arange(count, device=key.device)
    out = torch.full_like(key, -1)
    out[inside] = rank[index]
    return Groups(out, count)


def shared(total: int, sizes: Sequence[int], weights: Sequence[float] | Tensor | None = None) -> tuple[int, ...]:
    """`total` tokens over groups in proportion to `weights` by largest remainder: the sum is exact, no group exceeds its size.

    sizes: of the groups. weights: (g,) from 0; None: alike. What a full group cannot take goes to the others by their
    weights; if those are all 0, evenly. Equal remainders go to the earlier group. `total` above all sizes keeps everything.
    Raises ValueError for weights that are negative, NaN or infinite, or not one per group.
    """
    given = [1.0] * len(sizes) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(sizes):
        raise ValueError(f"share needs one weight per group, {len(sizes)}, got {len(given)}")
    if any(not math.isfinite(weight) or weight < 0 for weight in given):
        raise ValueError("share needs finite weights from 0")
    if total < 0:
        raise ValueError(f"share needs a whole number of tokens from 0, got {total}")
    exact = [Fraction(weight) for weight in given]
    out, open_ = [0] * len(sizes), list(range(len(sizes)))
    left = min(total, sum(sizes))
    while left and open_:
        whole = sum(exact[group] for group in open_)
        part = {group: exact[group] / whole if whole else Fraction(1, len(open_)) for group in open_}
        full = [group for group in open_ if part[group] * left >= sizes[group]]
        if not full:
            for group in open_:
                out[group] = int(part[group] * left)
            rest = left - sum(out[group] for group in open_)
            # A stable sort: of equal remainders the earlier group's comes first.
            for group in sorted(open_, key=lambda group: out[group] - part[group] * left)[:rest]:
                out[group] += 1
            break
        for group in full:
            out[group] = sizes[group]
        left -= sum(sizes[group] for group in full)
        open_ = [group for group in open_ if group not in set(full)]
    return tuple(out)


def top_in_groups(scores: Tensor, groups: Groups, counts: Sequence[int]) -> Tensor:
    """(n,) bool: of each group the `counts` tokens of highest score. Ties go to the earlier token; NaN ranks last.

    scores: (n,) float.
    """
    order = scores.neg().argsort(stable=True)
    order = order[groups.index[order].argsort(stable=True)]
    group = groups.index[order]
    numbers = torch.arange(groups.count, device=group.device)
    rank = torch.arange(len(group), device=group.device) - torch.searchsorted(group, numbers)[group.clamp(min=0)]
    allowed = torch.tensor(counts, dtype=torch.long, device=group.device)[group.clamp(min=0)]
    mask = torch.zeros_like(group, dtype=torch.bool)
    mask[order[(group >= 0) & (rank < allowed)]] = True
    return mask
