"""What a comparison says, in words, made from its numbers alone: which arm to take, what is open, and what would settle it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenreduce.compare.statistics import Reach, examples_for_bound, examples_needed, reach
from tokenreduce.compare.summary import ALPHA, GAINS, KEEPS, LOSES, MARGIN

Entry = Mapping[str, Any]


def answer(summary: Mapping[str, Any]) -> list[str]:
    """Sentences for the top of a report: the choice, the rest, whether the task separates arms, and what more would take."""
    baseline = summary["baseline"]
    arms = [arm for arm in summary["arms"] if arm.get("verdict")]
    if not arms:
        return [f"Nothing is compared yet: no example is finished in {baseline} and another arm."]
    said = [_choice(arms, baseline)]
    losing = [arm for arm in arms if arm["verdict"] == LOSES]
    if losing:
        worse = _list(f"{arm['name']} ({_points(arm['difference'])})" for arm in losing)
        said.append(f"Worse than {baseline}: {worse}.")
    said += _alike(summary, arms)
    said.append(_separation(summary))
    said += _more(summary, arms, baseline)
    return said


def forewarning(examples: int, arms: int) -> str:
    """What so many examples can decide of so many arms beside the baseline, said before any of them runs."""
    return _reach(reach(examples, 2 * arms), examples, arms)


def _reach(found: Reach, examples: int, arms: int) -> str:
    family = "" if arms == 1 else f", corrected for {arms} arms"
    if found.least_difference is None:
        seen = "no difference can be significant"
    else:
        share = found.least_difference / examples
        seen = f"a difference can be significant from {found.least_difference} answers ({share:.1%}) on"
    enough = "" if found.excluded_loss < MARGIN else (
        f"; to exclude {MARGIN:.0%} takes {_examples_for(MARGIN, arms):,} examples or more"
    )  # fmt: skip
    return f"{examples:,} examples can exclude losses of {found.excluded_loss:.1%} at best, and {seen}{family}{enough}."


def _examples_for(loss: float, arms: int) -> int:
    return examples_for_bound(loss, 1 - ALPHA / max(2 * arms, 1))


def _choice(arms: Sequence[Entry], baseline: str) -> str:
    keeping = sorted((arm for arm in arms if arm["verdict"] in (KEEPS, GAINS)), key=lambda arm: arm["relative_flops"])
    if not keeping:
        return f"No arm is shown to keep the accuracy of {baseline}: for none of them is a loss of {MARGIN:.0%} or more excluded."
    best = keeping[0]
    speed = f", {best['prefill_speedup']:.2f}× in the prefill" if best.get("prefill_speedup") else ""
    low, high = best["difference_interval"]
    return (
        f"{best['name']} keeps the accuracy of {baseline} at the lowest cost: {best['relative_flops']:.1%} of the FLOPs{speed}; "
        f"accuracy {_points(best['difference'])} ({_points(low)} to {_points(high)}), a loss of {MARGIN:.0%} or more is excluded."
        + (f" So do, at higher cost: {_list(arm['name'] for arm in keeping[1:])}." if keeping[1:] else "")
    )


def _alike(summary: Mapping[str, Any], arms: Sequence[Entry]) -> list[str]:
    """Arms that this comparison cannot tell from each other, each group as large as it is."""
    names = [arm["name"] for arm in sorted(arms, key=lambda arm: -arm["accuracy"])]
    apart = {frozenset(pair["arms"]) for pair in summary["pairs"] if pair["p_holm"] <= ALPHA}
    groups: list[list[str]] = []
    for start, name in enumerate(names):
        group = [name]
        for other in names[start + 1 :]:
            if all(frozenset((member, other)) not in apart for member in group):
                group.append(other)
        if len(group) > 1 and not any(set(group) <= set(known) for known in groups):
            groups.append(group)
    return [f"Not to be told apart by accuracy here: {_list(group)}." for group in groups]


def _separation(summary: Mapping[str, Any]) -> str:
    pairs = summary["pairs"]
    apart = sum(pair["p_holm"] <= ALPHA for pair in pairs)
    if not apart:
        return f"This task separates none of the {len(pairs)} pairs of arms: at so many examples it cannot say which is better."
    return f"This task separates {apart} of {len(pairs)} pairs of arms (exact McNemar, Holm, 5 %)."


def _more(summary: Mapping[str, Any], arms: Sequence[Entry], baseline: str) -> list[str]:
    """How many more examples the open questions would take, if answers go on differing as they did."""
    examples, said = summary["examples"]["finished"], []
    needed: dict[str, int] = {}
    for arm in arms:
        if arm["verdict"] not in (KEEPS, GAINS, LOSES):
            discordant = (arm["only_arm"] + arm["only_baseline"]) / examples
            if arm["difference"] and discordant:
                more = examples_needed(discordant, arm["difference"], alpha=ALPHA / len(arms)) - examples
            else:
                more = _examples_for(MARGIN, len(arms)) - examples
            needed[arm["name"]] = max(more, 1)
    if needed:
        most = sorted(needed.items(), key=lambda item: item[1])
        listed = _list(f"{name} about {more:,} more" for name, more in most)
        said.append(f"To settle what is open against {baseline}, if answers go on differing as they did: {listed}.")
    return said


def _points(share: float) -> str:
    return f"{100 * share:+.1f} points".replace("-", "−")


def _list(names: Any) -> str:
    listed = list(names)
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"
