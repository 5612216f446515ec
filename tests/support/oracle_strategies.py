"""What each strategy decides, written a second time with Python loops: the last part of the oracle.

A new strategy joins with one entry in RULES. Nothing of tokenreduce is imported.
"""

from __future__ import annotations

import torch
from support.oracle_stages import RULES, Choice, Look, Plan, Rule, Site, Stage, order, queries_of


def similarities(look: Look) -> dict[int, tuple[int, float]]:
    """Each reducible token that has one before it in its slot: that one, and the cosine."""
    last: dict[tuple[int, int], int] = {}
    found = {}
    for i in look.reducible:
        token = look.tokens[i]
        spot = (token.medium, token.slot)
        if spot in last:
            a, b = look.x[i], look.x[last[spot]]
            norms = float(a.norm() * b.norm())
            if norms > 0:
                found[i] = (last[spot], float(a @ b) / norms)
        last[spot] = i
    return found


def similarity_merge(plan: Plan, stage: Stage, site: Site, look: Look) -> Choice:
    config, found, n = stage.config, similarities(look), len(look.tokens)
    weighted, reducible = config.get("weighting", "size") == "size", len(look.reducible)
    cosine = {i: value for i, (_, value) in found.items()}
    threshold = config.get("threshold")
    flags = {}
    if threshold is None:
        keep = plan.count(stage, site, look, "merge")
        if site[1] == "kv" and config.get("keep") is None:
            keep = min(max(keep - (n - reducible), 0), reducible)
        merging = plan.best(cosine, reducible - keep)
    else:
        for value in cosine.values():
            plan.margin = min(plan.margin, abs(value - threshold))
        merging = {i for i, value in cosine.items() if value >= threshold}
        if config.get("max_run"):
            span = [token.frame // config["max_run"] for token in look.tokens]
            merging = {i for i in merging if span[i] == span[found[i][0]]}
        below = len(merging) < config.get("stop_below", 0.1) * reducible
        if plan.budget is not None and reducible - len(merging) <= plan.room(stage, site, look, "bound"):
            allowed = reducible - min(plan.room(stage, site, look, "merge"), reducible)
            merging = plan.best({i: cosine[i] for i in merging}, allowed)
            flags = {"finished": True, "budget_met": True}
        elif below and not config.get("merge_below", False):
            return Choice(finished=True, consumed=False)
        else:
            flags = {"finished": below}
    target = list(range(n))
    for i in range(n):
        if i in merging:
            target[i] = target[found[i][0]]
    return Choice(target, weighted, **flags)


def received(look: Look, queries: str | int, heads: str) -> list[float]:
    """Attention that each token alive received from the last queries, from the whole matrix."""
    assert look.probs is not None
    n = look.probs.shape[1]
    rows = n if queries == "all" else 1 if queries == "last" else min(int(queries), n)
    sums = [[float(head[n - rows : n, key].sum()) for head in look.probs] for key in range(n)]
    by_place = {token.place: values for token, values in zip(look.asked, sums, strict=False)}
    mine = [by_place[token.place] for token in look.tokens]
    return [max(values) if heads == "max" else sum(values) / len(values) for values in mine]


def keep_only(look: Look, stay: set[int]) -> Choice:
    return Choice([i if i in stay or not token.reducible else -1 for i, token in enumerate(look.tokens)])


def importance_prune(plan: Plan, stage: Stage, site: Site, look: Look) -> Choice:
    scores = received(look, queries_of(stage.config), stage.config["heads"])
    assert look.probs is not None
    plan.selector += plan.reading(stage, look.probs.shape[1])
    return keep_only(look, plan.best({i: scores[i] for i in look.reducible}, plan.count(stage, site, look)))


def streaming_window(plan: Plan, stage: Stage, site: Site, look: Look) -> Choice:
    sinks, window = stage.config["sinks"], stage.config.get("window")
    if window is None:
        if stage.span is None:  # One for all layers.
            stage.span = plan.room(stage, site, look, "prune")
        window = stage.span - sinks
        assert window > 0
        if stage.span >= len(look.tokens):
            return Choice()
    return Choice(span=(sinks, window))


def random_prune(plan: Plan, stage: Stage, site: Site, look: Look) -> Choice:
    layer, kind = order(site)
    generator = torch.Generator().manual_seed(stage.config["seed"] + 3 * layer + kind)
    numbers = torch.rand(plan.total, generator=generator).tolist()
    scores = {i: numbers[look.tokens[i].position] for i in look.reducible}
    return keep_only(look, plan.best(scores, plan.count(stage, site, look)))


def uniform_frames(plan: Plan, stage: Stage, site: Site, look: Look) -> Choice:
    frames: dict[tuple[int, int], list[int]] = {}
    for i in look.reducible:
        frames.setdefault((look.tokens[i].medium, look.tokens[i].frame), []).append(i)
    names, count = sorted(frames), plan.count(stage, site, look)
    for kept in range(len(names), 0, -1):
        stay = {i for place in range(kept) for i in frames[names[place * len(names) // kept]]}
        if len(stay) <= count:
            return keep_only(look, stay)
    raise AssertionError("no frame fits: choose another budget for the test")


RULES.update(
    {
        "similarity_merge": Rule(similarity_merge),
        "importance_prune": Rule(importance_prune, "pre_ffn", attention=True, waits=True),
        "fastv": Rule(importance_prune, attention=True),
        "streaming_window": Rule(streaming_window, "kv"),
        "random": Rule(random_prune),
        "uniform_frames": Rule(uniform_frames),
    }
)
