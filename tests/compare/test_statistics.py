"""Statistics of a comparison against hand values and enumeration of every outcome."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenreduce.compare.statistics import (
    examples_for_bound,
    examples_needed,
    holm,
    loss_p,
    mcnemar,
    pareto,
    power,
    reach,
    score_interval,
    shuffled_agreement,
    wilson,
)

Z = 1.959963984540054


def test_wilson_by_hand() -> None:
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert wilson(10, 10) == pytest.approx((0.722467, 1.0), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))))
def test_wilsons_ends_are_where_the_score_test_turns(counts: tuple[int, int]) -> None:
    right, n = counts
    for end in wilson(right, n):
        if 0 < end < 1:
            assert abs(right / n - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(Z, rel=1e-6)


@pytest.mark.parametrize("n", range(0, 11))
def test_mcnemar_is_the_share_of_coin_tosses_at_least_as_uneven(n: int) -> None:
    tosses = [sum(toss) for toss in itertools.product((0, 1), repeat=n)]
    for first in range(n + 1):
        uneven = sum(abs(2 * heads - n) >= abs(2 * first - n) for heads in tosses)
        assert mcnemar(first, n - first) == pytest.approx(uneven / len(tosses))


def test_mcnemar_by_hand_and_where_floats_end() -> None:
    assert mcnemar(1, 9) == 22 / 1024
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(1000, 1000) == 1.0
    assert 0 < mcnemar(900, 1100) < 1e-4
    assert mcnemar(0, 5000) == 0.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.sampled_from([0.01, 0.05, 0.2]))
def test_holm_rejects_what_stepping_down_rejects(p_values: list[float], alpha: float) -> None:
    rejected = set()
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if (len(p_values) - rank) * p_values[i] > alpha:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(p_values)) if p <= alpha} == rejected


@pytest.mark.parametrize(("n", "first", "second"), [(6, 0.5, 0.1), (7, 0.7, 0.0), (7, 0.3, 0.3)])
def test_power_sums_over_every_outcome(n: int, first: float, second: float) -> None:
    chance = {1: first, -1: second, 0: 1 - first - second}
    brute = 0.0
    for outcome in itertools.product(chance, repeat=n):
        if mcnemar(outcome.count(1), outcome.count(-1)) <= 0.05:
            brute += math.prod(chance[each] for each in outcome)
    assert power(n, first, second) == pytest.approx(brute, abs=1e-9)


def test_power_needs_discordant_pairs() -> None:
    assert power(50, 0.0, 0.0) == 0.0
    assert power(50, 0.4, 0.0) > 0.999


@pytest.mark.parametrize(("discordant", "difference"), [(0.2, 0.1), (0.3, 0.1), (0.15, 0.05)])
def test_examples_needed_have_about_the_power_asked_for(discordant: float, difference: float) -> None:
    n = examples_needed(discordant, difference)
    exact = power(n, (discordant + difference) / 2, (discordant - difference) / 2)
    assert 0.74 < exact < 0.82  # the exact test is a little more careful than its approximation


def test_examples_needed_by_hand() -> None:
    # (1.95996·√0.2 + 0.84162·√0.19)² / 0.1² = 154.6
    assert examples_needed(0.2, 0.1) == 155
    assert examples_needed(0.0, -0.1) == examples_needed(0.1, 0.1)
    with pytest.raises(ValueError, match="difference of 0"):
        examples_needed(0.2, 0.0)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("abc")), min_size=1, max_size=6))
def test_the_mean_of_shuffles_is_over_all_orders(pairs: list[tuple[str, str]]) -> None:
    said, expected = [a for a, _ in pairs], [b for _, b in pairs]
    orders = list(itertools.permutations(expected))
    brute = sum(sum(a == b for a, b in zip(said, order, strict=True)) for order in orders) / len(orders)
    right, mean = shuffled_agreement(said, expected, seed=1)
    assert mean == pytest.approx(brute)
    assert 0 <= right <= len(pairs)
    assert shuffled_agreement(said, expected, seed=1) == (right, mean)


def test_pareto_by_hand() -> None:
    points = [(1.0, 0.9), (0.3, 0.9), (0.3, 0.8), (0.2, 0.5), (0.5, 0.95), (0.2, 0.5)]
    assert pareto(points) == [False, True, False, True, True, True]


def test_the_score_interval_is_tangos() -> None:
    low, high = score_interval(9, 1, 44)
    for end, sign in ((low, 1), (high, -1)):
        assert _tango(9, 1, 44, end) == pytest.approx(sign * 1.959964, abs=1e-4)
    z2 = 1.959964**2
    assert score_interval(0, 0, 100) == pytest.approx((-z2 / (100 + z2), z2 / (100 + z2)), abs=1e-6)
    assert score_interval(3, 3, 50)[0] == pytest.approx(-score_interval(3, 3, 50)[1])


def _tango(b: int, c: int, n: int, delta: float) -> float:
    """The score with the nuisance share found by brute force: the likelihood's maximum on a fine grid."""
    shares = np.linspace(1e-7, 0.5, 2_000_001)
    other = shares + delta
    fits = (other > 0) & (shares + other < 1)
    shares, other = shares[fits], other[fits]
    likelihood = b * np.log(other) + c * np.log(shares) + (n - b - c) * np.log(1 - shares - other)
    share = float(shares[likelihood.argmax()])
    return float((b - c - n * delta) / np.sqrt(n * (2 * share + delta * (1 - delta))))


@pytest.mark.parametrize("examples", [30, 60, 200])
@pytest.mark.parametrize(("better", "worse"), [(0.0, 0.01), (0.005, 0.02), (0.02, 0.05), (0.1, 0.1), (0.05, 0.2)])
def test_the_score_interval_covers_what_it_promises(examples: int, better: float, worse: float) -> None:
    """By summing over every outcome: a percentile bootstrap covers 0.26 to 0.9 of them where losses are rare."""
    covered = 0.0
    logs = [math.lgamma(k + 1) for k in range(examples + 1)]
    shares = (better, worse, 1 - better - worse)
    for b in range(examples + 1):
        for w in range(examples + 1 - b):
            rest = examples - b - w
            if (b and not better) or (w and not worse):
                continue
            chance = logs[examples] - logs[b] - logs[w] - logs[rest]
            chance += sum(k * math.log(share) for k, share in zip((b, w, rest), shares, strict=True) if k)
            if chance > -18:
                low, high = score_interval(b, w, examples)
                covered += math.exp(chance) * (low <= better - worse <= high)
    assert covered > 0.93


@pytest.mark.parametrize(
    ("better", "worse", "pairs"), [(0, 0, 100), (0, 0, 128), (0, 0, 129), (2, 3, 300), (5, 1, 60), (0, 4, 500)]
)
def test_the_test_against_a_loss_is_the_interval(better: int, worse: int, pairs: int) -> None:
    excluded = score_interval(better, worse, pairs).low > -0.03
    assert (loss_p(better, worse, pairs, 0.03) < 0.05) == excluded


@pytest.mark.parametrize(("loss", "examples"), [(0.003, 1277), (0.014, 271), (0.03, 125)])
def test_what_so_many_examples_can_exclude(loss: float, examples: int) -> None:
    assert examples_for_bound(loss) == examples
    assert score_interval(0, 0, examples).low >= -loss > score_interval(0, 0, examples - 1).low
    assert reach(examples).excluded_loss <= loss


def test_what_so_many_examples_can_show() -> None:
    assert reach(20).least_difference == 6  # 2 / 2**6 = 0.031
    assert reach(20, comparisons=10).least_difference == 9
    assert reach(5).least_difference is None
