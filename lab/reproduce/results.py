"""From rows to what a table says: counts, intervals, paired tests, and whether the paper's orderings hold."""

from __future__ import annotations

import statistics as means
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lab.reproduce.paper import CLAIMS, Claim
from lab.reproduce.plan import Panel, Table, limited
from lab.reproduce.rows import Rows
from tokenreduce.compare.arms import BASELINE
from tokenreduce.compare.statistics import holm, loss_p, mcnemar, pareto, score_interval, wilson

ALPHA = 0.05
HOLDS, REVERSED, OPEN, NOT_RUN = "holds", "reversed", "not settled", "not run"
FAILS, ABSENT = "fails", "absent"
SMALL = 0.03
"""An ordering whose advantage is less than so many points is not there at any size that would matter."""
Answers = Mapping[int, dict[str, Any]]


def tabulate(table: Table, rows: Rows, most: int | None) -> dict[str, Any]:
    """A table as plain data: panels of arms, and claims with their verdicts."""
    answers: dict[tuple[str, str], Answers] = {}
    panels = []
    for panel in table.panels:
        examples = limited(panel.examples, most)
        own = {arm: rows.of(panel.condition, arm, examples) for arm in panel.arms}
        answers |= {(panel.condition.key, arm): found for arm, found in own.items()}
        panels.append(_panel(panel, own) | {"planned": examples})
    return {
        "key": table.key,
        "title": table.title,
        "panels": panels,
        "claims": judge(CLAIMS[table.key], answers),
    }


def _panel(panel: Panel, own: Mapping[str, Answers]) -> dict[str, Any]:
    entries = [entry(arm, own[arm], own[BASELINE]) for arm in panel.arms]
    tested = [e for e in entries if "p" in e]
    for e, p in zip(tested, holm([e["p"] for e in tested]), strict=True):
        e["p_holm"] = p
    ran = [e for e in entries if e["examples"]]
    for e, on in zip(ran, pareto([(e["relative_flops"], e["accuracy"]) for e in ran]), strict=True):
        e["pareto"] = on
    return {"condition": panel.condition.key, "label": panel.condition.label, "arms": entries, "grid": grid(own)}


def entry(arm: str, rows: Answers, dense: Answers) -> dict[str, Any]:
    """One arm: right answers with Wilson's 95 % interval, what it cost, where the needle's token went, and dense beside it."""
    ran = [row for row in rows.values() if "right" in row]
    refused = [row["refused"] for row in rows.values() if "refused" in row]
    made: dict[str, Any] = {"arm": arm, "examples": len(ran), "refused": len(refused)}
    if refused:
        made["refusal"] = refused[0]
    if not ran:
        return made
    right = sum(row["right"] for row in ran)
    went = Counter(row["needle"] for row in ran)
    gone = [bool(row["right"]) for row in ran if row["needle"] == "dropped"]
    made |= {
        "right": right,
        "accuracy": right / len(ran),
        "interval": list(wilson(right, len(ran))),
        "relative_tokens": means.fmean(row["relative_tokens"] for row in ran),
        "relative_flops": means.fmean(row["relative_flops"] for row in ran),
        "tokens_per_layer": [
            round(means.fmean(layer), 1) for layer in zip(*(row["tokens"] for row in ran), strict=True)
        ],
        "needle": {fate: went[fate] / len(ran) for fate in ("kept", "merged", "dropped")},
        "needle_dropped": {"right": sum(gone), "examples": len(gone)},
    }
    if arm == BASELINE:
        return made
    against = paired(rows, dense)
    return made | against | ({"of": _share(dense)} if against else {})


def paired(one: Answers, other: Answers) -> dict[str, Any]:
    """`one` minus `other` on the examples that both have: difference with Tango's 95 % interval, exact McNemar p."""
    both = [i for i in one if i in other and "right" in one[i] and "right" in other[i]]
    if not both:
        return {}
    pairs = [(bool(one[i]["right"]), bool(other[i]["right"])) for i in both]
    better, worse = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    return {
        "pairs": len(pairs),
        "difference": (better - worse) / len(pairs),
        "difference_interval": list(score_interval(better, worse, len(pairs))),
        "only_this": better,
        "only_other": worse,
        "p": mcnemar(better, worse),
        # Against an advantage of SMALL: a loss of as much, seen from the other side.
        "p_absent": loss_p(worse, better, len(pairs), SMALL),
    }


def judge(claims: tuple[Claim, ...], answers: Mapping[tuple[str, str], Answers]) -> list[dict[str, Any]]:
    """Each claim with its numbers and a verdict.

    Orderings that hold, are reversed or are absent are verdicts of one family: Holm corrects the p-values of all together.
    """
    made = []
    for claim in claims:
        one, other = (answers[claim.condition.key, arm] for arm in (claim.better, claim.worse))
        numbers = paired(one, other)
        share = _share(other) if numbers else 0.0
        made.append(
            {
                "condition": claim.condition.label,
                "better": claim.better,
                "worse": claim.worse,
                "within": claim.within,
                "source": claim.source,
                **numbers,
                **({"of": share} if share else {}),
            }
        )
    orderings = [m for m in made if m["within"] is None and "p" in m]
    corrected = holm([m[p] for p in ("p", "p_absent") for m in orderings])
    for m, p, p_absent in zip(orderings, corrected, corrected[len(orderings) :], strict=False):
        m["p_holm"], m["p_absent_holm"] = p, p_absent
    for m in made:
        m["verdict"] = verdict(m)
    return made


def verdict(claim: Mapping[str, Any]) -> str:
    """`holds`; of an ordering `reversed` or `absent`, of a bound `fails`; `not settled` where not 95 % sure of any; `not run`."""
    if "p" not in claim:
        return NOT_RUN
    if claim["within"] is None:
        if claim["p_holm"] > ALPHA or claim["difference"] == 0:
            return ABSENT if claim["p_absent_holm"] <= ALPHA else OPEN
        return HOLDS if claim["difference"] > 0 else REVERSED
    if "of" not in claim:
        return OPEN
    low, high = (end / claim["of"] for end in claim["difference_interval"])
    if low >= -claim["within"]:
        return HOLDS
    return FAILS if high < -claim["within"] else OPEN


def _share(rows: Answers) -> float:
    ran = [bool(row["right"]) for row in rows.values() if "right" in row]
    return sum(ran) / len(ran)


def grid(own: Mapping[str, Answers]) -> dict[str, list[dict[str, Any]]]:
    """Per arm, accuracy at each place of the needle, 0 first frame … 1 last; empty where places were left to chance."""
    out: dict[str, list[dict[str, Any]]] = {}
    for arm, rows in own.items():
        ran = [row for row in rows.values() if "right" in row]
        places = sorted({row["position"] for row in ran})
        if len(places) > 8 or not rows:
            return {}
        cells = []
        for place in places:
            right = [row["right"] for row in ran if row["position"] == place]
            cells.append(
                {
                    "position": place,
                    "right": sum(right),
                    "examples": len(right),
                    "interval": list(wilson(sum(right), len(right))),
                }
            )
        out[arm] = cells
    return out
