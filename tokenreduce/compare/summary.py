"""From rows to what a comparison says: per arm its accuracy, what it costs, and whether it differs from the baseline."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tokenreduce.compare.arms import Arm
from tokenreduce.compare.checks import check_finite, check_shuffled
from tokenreduce.compare.statistics import (
    examples_needed,
    holm,
    loss_p,
    mcnemar,
    pareto,
    power,
    reach,
    score_interval,
    wilson,
)
from tokenreduce.compare.store import Store

Row = Mapping[str, Any]
LISTED = 12
"""Questions that an arm lost, at most so many are listed."""
MARGIN = 0.03
"""A loss of accuracy below which an arm counts as one that keeps it: three points."""
ALPHA = 0.05
"""Chance of any false verdict among all verdicts of a comparison."""
DIFFERENCES = (0.02, 0.05, 0.10)
"""Differences of accuracy for which the number of examples needed is told."""
BINS = 5
"""Ranges of the needle's position in the grid, where the task left it to chance."""
MARKS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
SECONDS = ("vision", "prefill", "selector", "turns", "decode_per_token")


def summarise(store: Store, arms: Sequence[Arm]) -> dict[str, Any]:
    """The summary of what a folder holds, as plain data. Times are medians in seconds, other costs are means."""
    settings = store.settings
    rows = {arm.name: [row for row in store.rows if row["arm"] == arm.name] for arm in arms}
    baseline, seed = settings["baseline"], settings["seed"]
    drawn = {picture["index"] for picture in store.pictures()}
    placed = settings["task"].get("positions", [None]) != [None]
    entries = [_arm(arm, rows[arm.name], placed) for arm in arms]
    tested = [entry for entry in entries if entry["name"] != baseline and entry["examples"]]
    if rows[baseline]:
        for entry in tested:
            entry.update(_against(rows[entry["name"]], rows[baseline]))
            entry["lost"] = _lost(rows[entry["name"]], rows[baseline], drawn)
            _speed(entry, next(other for other in entries if other["name"] == baseline))
        compared = [entry for entry in tested if "p" in entry]
        # "Differs" and "keeps the accuracy" are verdicts of one family: both are corrected for the number of both.
        corrected = holm([entry[p] for p in ("p", "p_loss") for entry in compared])
        for entry, p, p_loss in zip(compared, corrected, corrected[len(compared) :], strict=False):
            entry["p_holm"], entry["p_loss_holm"], entry["mark"] = p, p_loss, mark(p)
            entry["verdict"] = verdict(entry)
    held = [entry for entry in entries if entry["examples"]]
    front = pareto([(entry["relative_flops"], entry["accuracy"]) for entry in held])
    for entry, on in zip(held, front, strict=True):
        entry["pareto"] = on
    checks = store.checks()
    for arm in arms:
        if arm.pipeline is None and rows[arm.name]:
            checks.append(check_shuffled(arm.name, rows[arm.name], seed).to_dict())
        if rows[arm.name]:
            checks += [check.to_dict() for check in check_finite(arm.name, rows[arm.name])]
    asked = settings["examples"]
    finished = min((entry["examples"] for entry in entries), default=0)
    return {
        "ran_on": sorted({row["ran_on"] for row in store.rows if "ran_on" in row}),
        **{name: settings[name] for name in ("tokenreduce", "task", "seed", "baseline", "models", "new_tokens")},
        **{name: settings.get(name) for name in ("code", "environment", "files")},
        "examples": {"asked": asked, "finished": finished},
        "complete": finished >= asked,
        "arms": entries,
        "pairs": _pairs(rows),
        "margin": MARGIN,
        "reach": reach(finished, 2 * (len(arms) - 1))._asdict(),
        "checks": checks,
    }


KEEPS, LOSES, GAINS, OPEN = "keeps the accuracy", "loses", "gains", "not settled"


def verdict(entry: Mapping[str, Any]) -> str:
    """What the corrected tests say of an arm: it loses or gains, or keeps the accuracy within MARGIN, or nothing is settled.

    An arm may lose, and certainly less than MARGIN: then it keeps the accuracy."""
    if entry["p_loss_holm"] <= ALPHA:
        return GAINS if entry["p_holm"] <= ALPHA and entry["difference"] > 0 else KEEPS
    if entry["p_holm"] <= ALPHA:
        return LOSES if entry["difference"] < 0 else GAINS
    return OPEN


def _pairs(rows: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """Every two arms on the examples that both have; their p-values are corrected for the number of pairs."""
    right = {name: {row["index"]: bool(row["right"]) for row in own} for name, own in rows.items() if own}
    made: list[dict[str, Any]] = []
    for one, other in itertools.combinations(right, 2):
        both = right[one].keys() & right[other].keys()
        alone = sum(right[one][i] and not right[other][i] for i in both)
        other_alone = sum(right[other][i] and not right[one][i] for i in both)
        if both:
            made.append(
                {
                    "arms": [one, other],
                    "only": [alone, other_alone],
                    "examples": len(both),
                    "p": mcnemar(alone, other_alone),
                }
            )
    for pair, p in zip(made, holm([pair["p"] for pair in made]), strict=True):
        pair["p_holm"] = p
    return made


def mark(p: float) -> str:
    """Stars of a p-value: *** below 0.001, ** below 0.01, * below 0.05."""
    return next((stars for limit, stars in MARKS if p < limit), "n.s.")


def _arm(arm: Arm, rows: Sequence[Row], placed: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": arm.name,
        "method": arm.method,
        "model": arm.model,
        "budget": arm.budget,
        "share": arm.share,
        "examples": len(rows),
    }
    if not rows:
        return entry
    entry["not_finite"] = sum(not row.get("finite", True) for row in rows)
    right = sum(row["right"] for row in rows)
    entry |= {"right": right, "accuracy": right / len(rows), "interval": list(wilson(right, len(rows)))}
    agrees = [row["agrees"] for row in rows if row["agrees"] is not None]
    if agrees:
        entry |= {"agreement": sum(agrees) / len(agrees), "agreement_interval": list(wilson(sum(agrees), len(agrees)))}
        divergences = [row["kl"] for row in rows if row["kl"] is not None]
        entry["kl"] = statistics.fmean(divergences) if divergences else None
    for name in (
        "relative_tokens",
        "relative_flops",
        "flops",
        "selector_flops",
        "kv_bytes",
        "input_tokens",
        "new_tokens",
    ):
        entry[name] = statistics.fmean(row[name] for row in rows)
    entry["tokens_per_layer"] = _columns(row["tokens"] for row in rows)
    entry["flops_per_layer"] = _columns(row["layer_flops"] for row in rows)
    entry["seconds"] = {name: _median(row["seconds"][name] for row in rows) for name in SECONDS}
    for name in ("peak_bytes", "growth_bytes"):
        entry[name] = _median(row.get(name) for row in rows)
    entry["grid"] = grid(rows, placed)
    return entry


def _against(rows: Sequence[Row], baseline: Sequence[Row]) -> dict[str, Any]:
    """Paired statistics on the examples that both arms have."""
    other = {row["index"]: bool(row["right"]) for row in baseline}
    pairs = [(bool(row["right"]), other[row["index"]]) for row in rows if row["index"] in other]
    if not pairs:
        return {}
    better = sum(a and not b for a, b in pairs)
    worse = sum(b and not a for a, b in pairs)
    discordant = (better + worse) / len(pairs)
    return {
        "difference": (better - worse) / len(pairs),
        "difference_interval": list(score_interval(better, worse, len(pairs))),
        "only_arm": better,
        "only_baseline": worse,
        "p": mcnemar(better, worse),
        "p_loss": loss_p(better, worse, len(pairs), MARGIN),
        "examples_needed": {f"{d:g}": examples_needed(discordant, d) for d in DIFFERENCES},
        "power": {f"{d:g}": _power(len(pairs), discordant, d) for d in DIFFERENCES},
    }


def _lost(rows: Sequence[Row], baseline: Sequence[Row], drawn: Collection[int]) -> list[dict[str, Any]]:
    """Questions that the baseline alone got right, those with a picture first. drawn: indices of examples with one."""
    right = {row["index"] for row in baseline if row["right"]}
    lost = [row for row in rows if not row["right"] and row["index"] in right]
    lost.sort(key=lambda row: (row["index"] not in drawn, row["index"]))
    names = ("index", "id", "question", "expected", "reply")
    return [{name: row[name] for name in names} | {"drawn": row["index"] in drawn} for row in lost[:LISTED]]


def _power(examples: int, discordant: float, difference: float) -> float:
    """Chance that so many examples show a true difference, if pairs disagree as often as observed."""
    share = max(discordant, difference)
    return power(examples, (share + difference) / 2, (share - difference) / 2)


def _speed(entry: dict[str, Any], baseline: Mapping[str, Any]) -> None:
    """How much faster the prefill was, decoder alone and with the vision tower: ratios of medians."""
    own, other = entry["seconds"], baseline["seconds"]
    entry["prefill_speedup"] = other["prefill"] / own["prefill"]
    entry["whole_speedup"] = (other["prefill"] + other["vision"]) / (own["prefill"] + own["vision"])


def grid(rows: Sequence[Row], placed: bool) -> list[dict[str, Any]]:
    """Accuracy per length of the video and place of the needle: {frames, position, label, right, examples}; may be empty.

    placed: the task chose the places; else they are put into BINS ranges of equal width.
    """
    cells: dict[tuple[float, float], list[Row]] = {}
    for row in rows:
        if "position" not in row["cell"]:
            continue
        position = row["cell"]["position"]
        place = position if placed else min(int(position * BINS), BINS - 1) / BINS
        cells.setdefault((row["cell"]["frames"], place), []).append(row)
    return [
        {
            "frames": frames,
            "position": place,
            "label": f"{place:.2g}" if placed else f"{place:.1f}–{place + 1 / BINS:.1f}",
            "right": sum(row["right"] for row in own),
            "examples": len(own),
        }
        for (frames, place), own in sorted(cells.items())
    ]


def _columns(lists: Iterable[Sequence[float]]) -> list[float]:
    """Mean per layer."""
    return [float(value) for value in np.mean(list(lists), axis=0)]


def _median(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None
