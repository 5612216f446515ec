"""Statistics of paired right-or-wrong answers. Pure functions of counts and arrays; nothing is approximated unless said so."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Interval(NamedTuple):
    """Ends of a confidence interval."""

    low: float
    high: float


def wilson(right: int, examples: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927). (0, 1) without examples."""
    if examples == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, spread = right / examples, z * z / examples
    middle = share + spread / 2
    reach = z * math.sqrt(share * (1 - share) / examples + spread / examples / 4)
    # At none or all right, one end is 0 or 1 exactly; rounding would leave it beside.
    low = 0.0 if right == 0 else (middle - reach) / (1 + spread)
    high = 1.0 if right == examples else (middle + reach) / (1 + spread)
    return Interval(low, high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of McNemar's test: how surprising the split of the discordant pairs is under a fair coin.

    only_first, only_second: examples that one arm alone gets right.
    """
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, float(2 * tail / 2**discordant))  # whole numbers, divided once: exact for any count


def score(better: int, worse: int, pairs: int, delta: float) -> float:
    """Tango's score (1998) of a paired difference `delta`: standard normal, about, where it is true."""
    a, b = 2 * pairs, (2 * pairs - better + worse) * delta - better - worse
    share = (math.sqrt(max(b * b + 4 * a * worse * delta * (1 - delta), 0.0)) - b) / (2 * a)
    spread = pairs * (2 * share + delta * (1 - delta))
    return (better - worse - pairs * delta) / math.sqrt(spread) if spread > 0 else 0.0


def score_interval(better: int, worse: int, pairs: int, level: float = 0.95) -> Interval:
    """Tango's score interval (1998) of the paired difference (better − worse) / pairs.

    Unlike a bootstrap it has a width where no pair differs: nothing seen in 100 pairs is not nothing.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)

    def end(inside: float, outside: float) -> float:
        for _ in range(60):
            middle = (inside + outside) / 2
            found = abs(score(better, worse, pairs, middle)) <= z
            inside, outside = (middle, outside) if found else (inside, middle)
        return inside

    difference = (better - worse) / pairs
    return Interval(end(difference, -1.0), end(difference, 1.0))


def loss_p(better: int, worse: int, pairs: int, loss: float) -> float:
    """Two-sided p of Tango's score test against a true loss of `loss`, 1 unless less than that was seen.

    It is at most 1 − level exactly where the lower end of `score_interval` at that level lies above −loss.
    """
    seen = score(better, worse, pairs, -loss)
    return 2 * NormalDist().cdf(-seen) if seen > 0 else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values adjusted for their number, in the order given (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def power(examples: int, only_first: float, only_second: float, alpha: float = 0.05) -> float:
    """Chance that the exact McNemar test is significant, by summing over every outcome.

    only_first, only_second: probabilities that an example is right under one arm alone.
    """
    discordant = only_first + only_second
    if discordant <= 0:
        return 0.0
    share = only_first / discordant
    total = 0.0
    for n, weight in enumerate(_binomial(examples, discordant)):
        if weight > 1e-12:
            split = _binomial(n, share)
            below = _largest_significant(n, alpha)
            total += weight * float(split[: below + 1].sum() + split[n - below :].sum() if below >= 0 else 0.0)
    return min(1.0, total)


def _binomial(n: int, p: float) -> NDArray[np.float64]:
    """Probabilities of 0 … n successes."""
    k = np.arange(n + 1)
    if p <= 0 or p >= 1:
        certain: NDArray[np.float64] = (k == (0 if p <= 0 else n)).astype(np.float64)
        return certain
    factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log = factorial[n] - factorial - factorial[::-1]
    chances: NDArray[np.float64] = np.exp(log + k * math.log(p) + (n - k) * math.log1p(-p))
    return chances


@lru_cache(maxsize=4096)
def _largest_significant(n: int, alpha: float) -> int:
    """Largest k such that a split k : n − k has p ≤ alpha; −1 if there is none."""
    tail, k = 0, 0
    while 2 * (tail := tail + math.comb(n, k)) <= alpha * 2**n:
        k += 1
    return k - 1


def examples_needed(discordant: float, difference: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Examples at which McNemar's test sees `difference` with this power (Connor 1987, a normal approximation).

    discordant: share of the examples that one arm alone gets right; a difference cannot exceed it, so it is raised to it.
    """
    size = abs(difference)
    if size == 0:
        raise ValueError("no number of examples shows a difference of 0")
    share = max(discordant, size)
    normal = NormalDist()
    reach = normal.inv_cdf(1 - alpha / 2) * math.sqrt(share) + normal.inv_cdf(power) * math.sqrt(share - size**2)
    return math.ceil((reach / size) ** 2)


def examples_for_bound(loss: float, level: float = 0.95) -> int:
    """Fewest examples after which a loss of `loss` or more is excluded, if no answer differs. With fewer, nothing excludes it."""
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    return math.ceil(z2 * (1 - loss) / loss)


class Reach(NamedTuple):
    """What so many examples can decide, whatever the answers will be."""

    excluded_loss: float
    """Share of the examples: the smallest loss that can be excluded, where no answer differs."""
    least_difference: int | None
    """Answers that must differ, all one way, for the exact test to be significant; None where all of them are too few."""


def reach(examples: int, comparisons: int = 1, alpha: float = 0.05) -> Reach:
    """What `examples` can decide in a family of so many comparisons, each held to alpha / comparisons (Holm's first step)."""
    own = alpha / max(comparisons, 1)
    z2 = NormalDist().inv_cdf(1 - own / 2) ** 2
    least = next((k for k in range(1, examples + 1) if mcnemar(k, 0) <= own), None)
    return Reach(z2 / (examples + z2), least)


def shuffled_agreement(said: Sequence[Hashable], expected: Sequence[Hashable], seed: int) -> tuple[int, float]:
    """Answers that are right when the expected ones are dealt out at random, and the mean of that over all deals."""
    order = np.random.default_rng(seed).permutation(len(expected))
    right = sum(said[i] == expected[int(j)] for i, j in enumerate(order))
    wanted = Counter(expected)
    mean = sum(count * wanted[word] for word, count in Counter(said).items()) / max(len(expected), 1)
    return right, mean


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each (cost, value): whether no other point costs no more and is worth no less, one of the two strictly."""
    return [not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points) for cost, value in points]
