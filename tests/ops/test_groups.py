"""Groups, exact shares and the best of each group, against plain loops; attention of chosen rows against the whole matrix."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch

from tokenreduce.amounts import of_total
from tokenreduce.ops.attention import attention_rows
from tokenreduce.ops.groups import grouped, shared, top_in_groups


def test_groups_are_numbered_by_their_first_token() -> None:
    key = torch.tensor([7, 7, 3, -5, 3, 9, 7])
    groups = grouped(key, torch.tensor([True, False, True, False, True, True, True]))
    assert groups.index.tolist() == [0, -1, 1, -1, 1, 2, 0]
    assert groups.counts == (2, 2, 1)
    values = torch.tensor([1.0, 9.0, 2.0, 9.0, 4.0, 8.0, 3.0])
    assert groups.sums(values).tolist() == [4, 6, 8]
    assert groups.means(values).tolist() == [2, 3, 8]
    assert groups.first(values).tolist() == [1, 2, 8]
    assert groups.means(torch.tensor([1, 0, 2, 0, 5, 8, 4])).tolist() == [2.5, 3.5, 8]
    assert groups.spread(torch.tensor([10, 20, 30])).tolist() == [10, 10, 20, 10, 20, 30, 10]
    assert len(grouped(key, torch.zeros(7, dtype=torch.bool))) == 0


def loop_share(total: int, sizes: list[int], weights: list[float]) -> list[int]:
    """The rule in words, one full group at a time."""
    out, left, open_ = [0] * len(sizes), min(total, sum(sizes)), set(range(len(sizes)))
    while left and open_:
        whole = sum(Fraction(weights[g]) for g in open_)
        part = {g: Fraction(weights[g]) / whole if whole else Fraction(1, len(open_)) for g in open_}
        full = {g for g in open_ if part[g] * left >= sizes[g]}
        if full:
            for g in full:
                out[g] = sizes[g]
            left, open_ = left - sum(sizes[g] for g in full), open_ - full
            continue
        floors = {g: part[g] * left // 1 for g in open_}
        rest = left - sum(floors.values())
        for g in open_:
            out[g] = int(floors[g])
        for _ in range(int(rest)):
            best = max(sorted(open_), key=lambda g: part[g] * left - floors[g] - (out[g] > floors[g]))
            out[best] += 1
        break
    return out


def test_shares_are_exact_and_no_group_overflows() -> None:
    rng = random.Random(0)
    for _ in range(300):
        sizes = [rng.randint(0, 9) for _ in range(rng.randint(1, 6))]
        weights = [rng.choice([0.0, 1.0, 0.1, rng.random(), 1e-9]) for _ in sizes]
        total = rng.randint(0, 30)
        got = shared(total, sizes, weights)
        assert sum(got) == min(total, sum(sizes))
        assert all(0 <= one <= size for one, size in zip(got, sizes, strict=True))
        assert list(got) == loop_share(total, sizes, weights)
    assert shared(10, [9, 9, 9], torch.tensor([1.0, 1.0, 1.0])) == (4, 3, 3)
    for odd in ([1.0], [-1.0, 1.0], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="share needs"):
            shared(1, [1, 1], odd)


def test_the_best_of_each_group() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        key = torch.randint(-1, 4, (20,), generator=generator)
        scores = torch.randint(0, 5, (20,), generator=generator).float()
        scores[torch.rand(20, generator=generator) < 0.1] = float("nan")
        groups = grouped(key, key >= 0)
        counts = torch.randint(0, 6, (groups.count,), generator=generator).tolist()
        expected = set()
        for group, count in enumerate(counts):
            members = [i for i in range(20) if groups.index[i] == group]
            members.sort(key=lambda i: (bool(scores[i].isnan()), -float(scores[i].nan_to_num(0)), i))
            expected |= set(members[:count])
        assert set(top_in_groups(scores, groups, counts).nonzero()[:, 0].tolist()) == expected


def test_float_noise_costs_no_token() -> None:
    for count in range(1, 577):
        assert of_total(Fraction(repr(count / 576)), 576) == count
    assert of_total(Fraction("0.3"), 11) == 3


@pytest.mark.parametrize("rows", ["sum", "max", "each"])
@pytest.mark.parametrize("heads", ["mean", "max", "each"])
def test_attention_of_chosen_rows(rows: str, heads: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(h, n, 8, generator=generator, dtype=torch.float64) for h, n in ((4, 9), (2, 12)))
    whole = torch.einsum("hqd,hkd->hqk", q, k.repeat_interleave(2, 0)) * 0.3
    whole.masked_fill_(torch.ones(9, 12, dtype=torch.bool).triu(4), -torch.inf)
    places = torch.tensor([8, 0, 3, 3])
    seen = whole.softmax(-1)[:, places]
    seen = seen.sum(1) if rows == "sum" else seen.amax(1) if rows == "max" else seen
    expected = seen.mean(0) if heads == "mean" else seen.amax(0) if heads == "max" else seen
    got = attention_rows(q, k, 0.3, places, heads, rows)
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)
    none = attention_rows(q, k, 0.3, places[:0], heads, rows)
    assert none.shape == (*expected.shape[: -2 if rows == "each" else -1], *([0] if rows == "each" else []), 12)
