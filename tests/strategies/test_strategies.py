"""Each strategy on one sequence, against loops that say what its paper says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoders import context, embeddings
from torch import Tensor

from tokenreduce import plugins
from tokenreduce.errors import BudgetError, PipelineError
from tokenreduce.layout import TokenLayout
from tokenreduce.ops.similarity import cosine_to
from tokenreduce.reduction import Reduction
from tokenreduce.strategy import Decision, Site, Span, StageContext, Strategy

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True)
LAYOUT = TokenLayout.video(before=3, frames=5, per_frame=6, after=4)
TEXT = [0, 1, 2, 33, 34, 35, 36]


def stage(name: str, **fields: Any) -> Strategy:
    cls = plugins.strategies()[name]
    return cls(cls.Config(strategy=name, **fields))


def decide(strategy: Strategy, ctx: StageContext) -> Decision:
    answer = strategy.decide(ctx)
    decision = answer if isinstance(answer, Decision) else Decision(answer)
    if decision.reduction is not None:
        decision.reduction.validate()
    return decision


def kept(decision: Decision) -> list[int]:
    assert decision.reduction is not None
    return decision.reduction.kept[0].nonzero().squeeze(1).tolist()


def slow_merge(
    hidden: Tensor, layout: TokenLayout, threshold: float, most: int | None = None
) -> tuple[list[int], list[tuple[float, int]]]:
    """FrameFusion §4.1 by loops: target of each token, and (similarity, token) of those at or above the threshold.

    most: merge only so many of the most similar. The cosines are ours (tests/ops/test_ops.py holds them to the definition):
    those of a static video differ from 1 by rounding, and decide between its slots."""
    slots, media, reducible = layout.slot[0].tolist(), layout.media()[0].tolist(), layout.reducible()[0].tolist()
    before: dict[tuple[int, int], int] = {}
    previous = [-1] * len(hidden)
    for i in (i for i in range(len(hidden)) if reducible[i]):
        previous[i] = before.get((media[i], slots[i]), -1)
        before[media[i], slots[i]] = i
    values = cosine_to(hidden, torch.tensor(previous)).tolist()
    similar = [(value, i) for i, value in enumerate(values) if previous[i] >= 0 and value >= threshold]
    ranked = sorted(similar, key=lambda pair: (-pair[0], pair[1]))
    chosen = {i for _, i in (ranked if most is None else ranked[:most])}
    target = []
    for i in range(len(hidden)):
        at = i
        while at in chosen:
            at = previous[at]
        target.append(at)
    return target, similar


@given(
    st.sampled_from(["static", "noise", "mixed", "drift", "cuts"]),
    st.floats(-1, 1),
    st.integers(0, 99),
    st.one_of(st.none(), st.integers(1, 30)),
    st.booleans(),
)
@SETTINGS
def test_similarity_merge_is_the_paper_by_loops(
    kind: str, threshold: float, seed: int, allowance: int | None, merge_below: bool
) -> None:
    hidden = embeddings(LAYOUT, 8, kind, seed)[0]
    strategy = stage("similarity_merge", threshold=threshold, stop_below=0.2, merge_below=merge_below)
    decision = decide(strategy, context(hidden, LAYOUT, allowance=allowance))
    target, similar = slow_merge(hidden, LAYOUT, threshold)
    if allowance is not None and 30 - len(similar) <= allowance:  # N_max, §7
        target, _ = slow_merge(hidden, LAYOUT, threshold, most=30 - allowance)
        assert len(kept(decision)) == allowance + len(TEXT)
        assert (decision.finished, decision.budget_met) == (True, True)
    elif len(similar) / 30 < 0.2:
        assert (decision.finished, decision.budget_met, decision.consumed) == (True, False, merge_below)
        if not merge_below:
            assert decision.reduction is None
            return
    else:
        assert (decision.finished, decision.budget_met) == (False, False)
    assert decision.reduction is not None
    assert decision.reduction.target[0].tolist() == target


def test_a_run_is_transitive_and_compares_with_the_last_frame_not_the_first() -> None:
    """Each frame turns by 30°: neighbours are similar (cos 0.87), first and last are opposite, and all merge."""
    layout = TokenLayout.video(before=0, frames=7, per_frame=1, after=0)
    angle = torch.arange(7) * math.pi / 6
    hidden = torch.stack([angle.cos(), angle.sin()], 1)
    decision = decide(stage("similarity_merge", threshold=0.8), context(hidden, layout))
    assert decision.reduction is not None
    assert decision.reduction.target.tolist() == [[0] * 7]
    decision = decide(stage("similarity_merge", threshold=0.9), context(hidden, layout))
    assert decision.reduction is None


def test_merging_looks_at_the_previous_surviving_token() -> None:
    """The frame in between is gone: the slot's tokens of frames 0 and 2 are neighbours now."""
    layout = TokenLayout(slot=torch.tensor([[0, 1, 0]]), frame=torch.tensor([[0, 1, 2]]))
    decision = decide(stage("similarity_merge", threshold=0.9), context(torch.ones(3, 4), layout))
    assert kept(decision) == [0, 1]


def test_media_do_not_merge_with_each_other() -> None:
    layout = TokenLayout(
        slot=torch.tensor([[0, 0, 0, 0]]), frame=torch.tensor([[0, 1, 0, 1]]), medium=torch.tensor([[0, 0, 1, 1]])
    )
    decision = decide(stage("similarity_merge", threshold=0.5), context(torch.ones(4, 4), layout))
    assert kept(decision) == [0, 2]


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("fields", [{"threshold": -1.0, "stop_below": 0.0}, {"keep": 0.4}])
def test_bad_vectors_merge_with_nothing(bad: float, fields: dict[str, float]) -> None:
    """Every other token of a static video merges as if the bad ones were not there; no value is spread."""
    hidden = embeddings(LAYOUT, 8, "static")[0]
    rows = [3, 3 + 6 + 1, 3 + 12 + 2, 32, 0]  # First, inner and last frames, and a text token.
    hidden[rows] = bad
    decision = decide(stage("similarity_merge", **fields), context(hidden, LAYOUT))
    assert decision.reduction is not None
    target = decision.reduction.target[0].tolist()
    for row in rows:
        assert target[row] == row
        assert target.count(row) == 1
    reduced = decision.reduction.apply(hidden[None], torch.ones(1, 37, dtype=torch.long))
    assert reduced.hidden is not None
    whole = (hidden.isfinite() & (hidden != 0)).all(-1)
    assert int((~(reduced.hidden[0].isfinite() & (reduced.hidden[0] != 0)).all(-1)).sum()) == len(rows)
    assert int(whole.sum()) == 37 - len(rows)


def test_without_a_threshold_the_most_similar_merge() -> None:
    hidden = embeddings(LAYOUT, 8, "drift", 3)[0]
    for keep, count in ((0.9, 27), (0.5, 15), (0.25, 7)):
        decision = decide(stage("similarity_merge", keep=keep), context(hidden, LAYOUT))
        target, _ = slow_merge(hidden, LAYOUT, -2.0, most=30 - count)
        assert decision.reduction is not None
        assert decision.reduction.target[0].tolist() == target
    decision = decide(stage("similarity_merge"), context(hidden, LAYOUT, allowance=11))
    assert len(kept(decision)) == 11 + len(TEXT)
    with pytest.raises(BudgetError, match="would have to merge 27 of 30 vision tokens, but only 24 have a counterpart"):
        decide(stage("similarity_merge"), context(hidden, LAYOUT, allowance=3))


@pytest.mark.parametrize(("held", "left"), [(37, 30), (36, 29), (20, 13), (13, 6)])
def test_at_the_cache_the_allowance_counts_text_too(held: int, left: int) -> None:
    ctx = context(embeddings(LAYOUT, 8, "static")[0], LAYOUT, Site(2, "kv"), allowance=held)
    assert len(kept(decide(stage("similarity_merge", site="kv"), ctx))) == left + len(TEXT) == held


@pytest.mark.parametrize(
    ("fields", "first", "count"),
    [
        ({"threshold": 0.6}, ["layer[0].pre_attention", "layer[0].pre_ffn", "layer[1].pre_ffn"], 7),
        ({"threshold": 0.6, "from": 2, "until": 4}, ["layer[2].pre_attention", "layer[2].pre_ffn"], 4),
        ({"threshold": 0.6, "at": 3}, ["layer[3].pre_attention"], 1),
        ({"threshold": 0.6, "at": [1, 3], "site": "pre_ffn"}, ["layer[1].pre_ffn", "layer[3].pre_ffn"], 2),
        ({}, ["layer[0].pre_attention"], 1),
        ({"site": "kv"}, ["layer[0].kv", "layer[1].kv"], 6),
    ],
)
def test_similarity_merge_is_scheduled_as_the_paper_says(fields: dict[str, Any], first: list[str], count: int) -> None:
    sites = [str(site) for site in stage("similarity_merge", **fields).schedule(6)]
    assert sites[: len(first)] == first
    assert len(sites) == count
    assert sites == [
        str(site) for site in sorted(stage("similarity_merge", **fields).schedule(6), key=lambda s: s.order)
    ]


@pytest.mark.parametrize("name", ["importance_prune", "fastv"])
@given(
    scores=st.lists(st.one_of(st.floats(0, 1, width=32), st.just(math.nan)), min_size=37, max_size=37),
    count=st.integers(1, 30),
)
@SETTINGS
def test_pruning_keeps_the_tokens_that_attention_looks_at_most(name: str, scores: list[float], count: int) -> None:
    ctx = context(torch.zeros(37, 2), LAYOUT, Site(2, "pre_ffn"), allowance=count, scores=torch.tensor(scores))
    vision = [i for i in range(37) if i not in TEXT]
    ranked = sorted(vision, key=lambda i: (math.isnan(scores[i]), 0 if math.isnan(scores[i]) else -scores[i], i))
    assert kept(decide(stage(name), ctx)) == sorted(TEXT + ranked[:count])


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({}, ("all", "mean")),
        ({"importance": "last", "heads": "max"}, ("last", "max")),
        ({"importance": "window", "window": 5}, (5, "mean")),
    ],
)
def test_importance_asks_for_the_rows_it_is_told_to(fields: dict[str, Any], asked: tuple[Any, str]) -> None:
    seen: list[tuple[Any, str]] = []
    ctx = context(torch.zeros(37, 2), LAYOUT, Site(1, "pre_ffn"), allowance=4)
    ctx.attention_source = lambda queries, heads: (seen.append((queries, heads)), torch.arange(37.0))[1]
    decide(stage("importance_prune", **fields), ctx)
    assert seen == [asked]
    if not fields:
        decide(stage("fastv"), ctx)
        assert seen[-1] == ("last", "mean")


def test_keep_is_a_share_of_the_original_tokens_rounded_down_and_at_least_one() -> None:
    ctx = context(torch.zeros(37, 2), LAYOUT, Site(2, "pre_ffn"), scores=torch.arange(37.0))
    for keep, count in ((0.3, 9), (0.1, 3), (0.01, 1), (1.0, 30)):
        assert len(kept(decide(stage("fastv", keep=keep), ctx))) == count + len(TEXT)
    ctx = context(torch.zeros(37, 2), LAYOUT, Site(4, "pre_attention"), depth=6, scores=torch.arange(37.0))
    assert len(kept(decide(stage("fastv", at=[2, 4], keep=[0.5, 0.2]), ctx))) == 6 + len(TEXT)
    with pytest.raises(BudgetError, match="there is none; give `budget` or the stage's `keep`"):
        decide(stage("fastv"), ctx)


def test_random_depends_on_seed_site_and_positions_only() -> None:
    ctx = context(torch.zeros(37, 2), LAYOUT, allowance=10)
    first = kept(decide(stage("random"), ctx))
    assert first == kept(decide(stage("random"), context(torch.ones(37, 2), LAYOUT, allowance=10)))
    assert len(first) == 10 + len(TEXT)
    assert first != kept(decide(stage("random", seed=1), ctx))
    scores = ctx.random(7)
    ctx.position = torch.tensor([0, 5, 36])
    assert torch.equal(ctx.random(7), scores[[0, 5, 36]])


def test_random_is_fair() -> None:
    """Every vision token is kept about as often as any other."""
    counts = torch.zeros(37)
    for seed in range(600):
        counts[kept(decide(stage("random", seed=seed), context(torch.zeros(37, 2), LAYOUT, allowance=15)))] += 1
    vision = counts[LAYOUT.vision[0]]
    assert float(vision.mean()) == 300
    assert float((vision - 300).abs().max()) < 5 * math.sqrt(600 / 4)


@pytest.mark.parametrize(
    ("count", "frames"), [(30, [0, 1, 2, 3, 4]), (29, [0, 1, 2, 3]), (18, [0, 1, 3]), (12, [0, 2]), (6, [0]), (11, [0])]
)
def test_uniform_frames_keeps_whole_frames_at_even_distances(count: int, frames: list[int]) -> None:
    decision = decide(stage("uniform_frames"), context(torch.zeros(37, 2), LAYOUT, allowance=count))
    assert sorted({int(LAYOUT.frame[0, i]) for i in kept(decision)} - {-1}) == frames
    assert len(kept(decision)) == 6 * len(frames) + len(TEXT)
    assert set(TEXT) <= set(kept(decision))


def test_uniform_frames_counts_frames_of_every_medium_and_size() -> None:
    layout = TokenLayout(
        slot=torch.tensor([[0, 1, 2, 0, 0, 1]]),
        frame=torch.tensor([[0, 0, 0, 1, 0, 0]]),
        medium=torch.tensor([[0, 0, 0, 0, 1, 1]]),
    )
    for count, expected in ((6, [0, 1, 2, 3, 4, 5]), (5, [0, 1, 2, 3]), (3, [0, 1, 2])):
        assert kept(decide(stage("uniform_frames"), context(torch.zeros(6, 2), layout, allowance=count))) == expected
    with pytest.raises(BudgetError, match="may keep 2 vision tokens, and its first frame has 3"):
        decide(stage("uniform_frames"), context(torch.zeros(6, 2), layout, allowance=2))


def test_streaming_window_spends_the_allowance_on_sinks_and_window() -> None:
    ctx = context(torch.zeros(37, 2), LAYOUT, Site(0, "kv"), allowance=20)
    assert decide(stage("streaming_window"), ctx).span == Span(sinks=8, window=12)
    assert decide(stage("streaming_window", sinks=0, window=5), ctx).span == Span(0, 5)
    ctx = context(torch.zeros(37, 2), LAYOUT, Site(0, "kv"), allowance=37)
    assert decide(stage("streaming_window"), ctx) == Decision()
    ctx = context(torch.zeros(37, 2), LAYOUT, Site(0, "kv"), allowance=8)
    with pytest.raises(BudgetError, match="may hold 8 tokens per layer, no more than its 8 sinks"):
        decide(stage("streaming_window"), ctx)


@pytest.mark.parametrize("name", ["similarity_merge", "importance_prune", "fastv", "random", "uniform_frames"])
def test_decisions_touch_no_input_and_no_protected_token(name: str) -> None:
    protected = torch.rand(1, 37, generator=torch.Generator().manual_seed(5)) < 0.3
    layout = TokenLayout(slot=LAYOUT.slot, frame=LAYOUT.frame, protected=protected)
    hidden = embeddings(layout, 8, "static")[0]
    ctx = context(hidden, layout, Site(1, "pre_attention"), allowance=10, scores=torch.arange(37.0))
    before = [hidden.clone(), ctx.size.clone(), ctx.reducible.clone(), ctx.slot.clone(), ctx.position.clone()]
    decision = decide(stage(name), ctx)
    assert isinstance(decision.reduction, Reduction)
    after = [hidden, ctx.size, ctx.reducible, ctx.slot, ctx.position]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert bool((decision.reduction.kept[0] | layout.reducible()[0]).all())
    assert int((decision.reduction.kept[0] & layout.reducible()[0]).sum()) <= 10
    again = decide(stage(name), ctx)
    assert again.reduction is not None
    assert torch.equal(again.reduction.target, decision.reduction.target)


def test_a_site_that_a_strategy_does_not_know_is_refused() -> None:
    with pytest.raises(PipelineError, match="fastv cannot act at site 'kv'"):
        stage("fastv", site="kv")
