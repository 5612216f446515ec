"""What strategies share, against loops that say the definition: choices, clusters, segments, quadtrees."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tokenreduce.ops.choose import directions, dpp, max_min, nearest_other
from tokenreduce.ops.cluster import components, density_peaks, nearest
from tokenreduce.ops.frames import slot_table, still_slots
from tokenreduce.ops.matching import matching_round
from tokenreduce.ops.quadtree import nodes, pyramid, united
from tokenreduce.ops.segments import completed_segments, cut_segments, static_windows, windows_of_clusters

SEEDS = range(4)


def rows(seed: int, n: int = 11, width: int = 5) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(x: Tensor, i: int, j: int) -> float:
    return float(x[i] @ x[j] / (x[i].norm() * x[j].norm()))


def test_directions_of_zeros_infinities_and_large_rows() -> None:
    x = torch.tensor([[0.0, 0.0], [torch.inf, 1.0], [3e30, 4e30], [torch.nan, 1.0]])
    torch.testing.assert_close(directions(x), torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.6, 0.8], [0.0, 0.0]]))


@pytest.mark.parametrize("seed", SEEDS)
def test_max_min_is_the_greedy_choice_by_loops(seed: int) -> None:
    x = rows(seed)
    n = len(x)
    alone = [max(cosine(x, i, j) for j in range(n) if j != i) for i in range(n)]
    torch.testing.assert_close(nearest_other(directions(x)), torch.tensor(alone, dtype=torch.float64))
    order = [min(range(n), key=lambda i: alone[i])]
    while len(order) < 6:
        rest = [i for i in range(n) if i not in order]
        order.append(min(rest, key=lambda i: max(cosine(x, i, j) for j in order)))
    assert max_min(directions(x), 6).tolist() == order


def test_max_min_and_dpp_choose_equal_tokens_once() -> None:
    u = directions(torch.ones(5, 3))
    assert sorted(max_min(u, 5).tolist()) == list(range(5))
    assert sorted(dpp(u, torch.ones(5), 5).tolist()) == list(range(5))


@pytest.mark.parametrize("seed", SEEDS)
def test_dpp_adds_the_token_of_largest_determinant(seed: int) -> None:
    x = rows(seed, 9)
    quality = torch.rand(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    u = directions(x)
    kernel = quality[:, None] * (u @ u.T) * quality
    order: list[int] = []
    while len(order) < 4:
        rest = [i for i in range(9) if i not in order]
        order.append(max(rest, key=lambda i: float(kernel[[*order, i]][:, [*order, i]].det())))
    assert dpp(u, quality, 4).tolist() == order


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("threshold", [-1.1, 0.2, 0.5, 1.0])
def test_components_by_search(seed: int, threshold: float) -> None:
    x = rows(seed, 14, 3)
    u = directions(x)
    near = [[float(u[i] @ u[j]) > threshold for j in range(14)] for i in range(14)]
    label = [-1] * 14
    for start in range(14):
        todo = [start] if label[start] < 0 else []
        while todo:
            i = todo.pop()
            label[i] = start
            todo += [j for j in range(14) if near[i][j] and label[j] < 0 and j not in todo]
    assert components(u, threshold).tolist() == label


def test_a_long_chain_is_one_component() -> None:
    angle = torch.arange(40, dtype=torch.float64).flip(0)[
        torch.randperm(40, generator=torch.Generator().manual_seed(0))
    ]
    u = torch.stack([(0.05 * angle).cos(), (0.05 * angle).sin()], 1)
    assert components(u, math.cos(0.06)).unique().tolist() == [0]


@pytest.mark.parametrize("seed", SEEDS)
def test_density_peaks_by_loops(seed: int) -> None:
    x = rows(seed, 12)
    distance = [[float((a - b).norm()) / math.sqrt(5) for b in x] for a in x]
    density = [math.exp(-sum(d * d for d in sorted(row)[:4]) / 4) for row in distance]
    most = max(max(row) for row in distance)
    score = [
        min([distance[i][j] for j in range(12) if density[j] > density[i]], default=most) * density[i]
        for i in range(12)
    ]
    centres = sorted(range(12), key=lambda i: -score[i])[:3]
    found, assigned = density_peaks(x, 3, 4)
    assert found.tolist() == centres
    expected = [min(range(3), key=lambda c: distance[centres[c]][i]) for i in range(12)]
    for place, centre in enumerate(centres):
        expected[centre] = place
    assert assigned.tolist() == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_matching_and_nearest_by_loops(seed: int) -> None:
    u = directions(rows(seed))
    best = {i: max(range(1, 11, 2), key=lambda j: float(u[i] @ u[j])) for i in range(0, 11, 2)}
    order = sorted(best, key=lambda i: -float(u[i] @ u[best[i]]))
    found = matching_round(u, 3)
    assert found.gone.tolist() == order[:3]
    assert found.into.tolist() == [best[i] for i in order[:3]]
    assert found.stay.tolist() == [*order[3:], *range(1, 11, 2)]
    assert nearest(u, u[:4]).tolist() == [max(range(4), key=lambda c: float(u[i] @ u[c])) for i in range(11)]


def test_segments() -> None:
    similarity = [0.99, 0.5, 0.95, 0.97, 0.2]
    assert cut_segments(similarity, 0.9, 0) == [2, 3, 1]
    assert cut_segments(similarity, 0.9, 3) == [2, 1, 2, 1]
    assert cut_segments(similarity, -1, 0) == [6]
    assert completed_segments(similarity, 0.9, 4) == [2, 1, 2, 1]
    assert completed_segments([], 0.9, 4) == [1]
    assert windows_of_clusters([0, 0, 0, 1, 0, 2, 2]) == [5, 2]
    assert windows_of_clusters([0, 1, 0, 1]) == [4]
    assert windows_of_clusters([0, 0, 1, 1, 0, 0]) == [2, 2, 2]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("longest", [2, 3, 9])
def test_static_windows_save_most_of_all_partitions(seed: int, longest: int) -> None:
    still = torch.rand(6, 5, generator=torch.Generator().manual_seed(seed)) < 0.6

    def saved(lengths: list[int]) -> int:
        start = total = 0
        for length in lengths:
            if length > 1:
                total += int(still[start : start + length - 1].all(0).sum()) * (length - 1)
            start += length
        return total

    every = [
        [b - a for a, b in itertools.pairwise([0, *cuts, 7])]
        for k in range(7)
        for cuts in itertools.combinations(range(1, 7), k)
    ]
    found = static_windows(still, longest)
    assert sum(found) == 7
    assert saved(found) == max(saved(each) for each in every if max(each) <= longest)


def test_still_slots_are_the_mean_over_pairs_of_frames() -> None:
    x = rows(1, 12)
    table = slot_table(torch.arange(12) // 3, torch.arange(12) % 3, torch.ones(12, dtype=torch.bool))
    assert table.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    mean = [sum(cosine(x, 3 * a + s, 3 * b + s) for a, b in itertools.combinations(range(4), 2)) / 6 for s in range(3)]
    for threshold in sorted([*mean, 0.0]):
        assert still_slots(x, table, threshold + 1e-9).tolist() == [m > threshold + 1e-9 for m in mean]
    table[2, 1] = -1
    assert not still_slots(x, table, -1.0)[1]


def test_a_quadtree_stops_where_children_are_alike() -> None:
    x = torch.eye(4, dtype=torch.float64)[torch.tensor([[0, 0, 1, 2], [0, 0, 3, 1], [2, 2, 2, 2], [2, 2, 2, 2]])][None]
    levels = pyramid(x, torch.ones(1, 4, 4, dtype=torch.bool))
    assert [tuple(level.here.shape[1:]) for level in levels] == [(4, 4), (2, 2)]
    torch.testing.assert_close(levels[1].value[0, 0, 1], x[0, :2, 2:].mean((0, 1)))
    found = nodes(levels, 0, 0.9, released=False)[0]
    assert found.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_nodes_hang_together_by_edges() -> None:
    first, second = torch.tensor([3, 5, 1]), torch.tensor([5, 6, 2])
    assert united(first, second, 7).tolist() == [0, 1, 1, 3, 4, 3, 3]
