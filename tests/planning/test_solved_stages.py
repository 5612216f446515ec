"""Stages that solve their count next to stages with a count of their own: what the one may spend, and when the other waits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoders import account, decoder, embeddings, tokens_of
from support.matrix import PROMPTS, Case, check_prefill, expect, model
from transformers import DynamicCache

import tokenreduce as tr
from tokenreduce.errors import BudgetError, PipelineError
from tokenreduce.hookspecs import hookimpl
from tokenreduce.pipeline import build, load_pipeline
from tokenreduce.planning.feasibility import check
from tokenreduce.planning.schedule import forecast
from tokenreduce.plugins import manager
from tokenreduce.strategy import Capabilities, CountView, Outcome, StageConfig, StageContext, Strategy

LAYOUT = tr.TokenLayout.video(before=2, frames=8, per_frame=5, after=2)
TOTAL, VISION = LAYOUT.shape[1], 40


def prefill(stages: list[dict[str, Any]], budget: Any, depth: int = 4, head: int = 1, kind: str = "mixed") -> tr.Trace:
    with torch.no_grad(), tr.reduce(decoder(depth), {"stages": stages}, layout=LAYOUT, budget=budget) as run:
        decoder(depth)(inputs_embeds=embeddings(LAYOUT, 32, kind), logits_to_keep=head)
    return run.trace


# Who waits for whom ---------------------------------------------------------------------------------------------------

FASTV, RANDOM, MERGE = {"strategy": "fastv", "at": 2}, {"strategy": "random", "at": 2}, {"strategy": "similarity_merge"}
PRUNE = {"strategy": "importance_prune"}


@pytest.mark.parametrize("solver", [FASTV, RANDOM], ids=lambda stage: stage["strategy"])
@pytest.mark.parametrize("share", [0.6, 0.7])
@pytest.mark.parametrize("keep", [0.9, 0.3, None])
def test_a_waiting_stage_lets_the_stage_before_it_solve_the_budget(solver: Any, share: float, keep: Any) -> None:
    alone = prefill([solver], share)
    trace = prefill([solver, PRUNE | {"keep": keep}], share)
    assert [stage.strategy for stage in trace.stages] == [solver["strategy"], "importance_prune"]
    assert trace.skipped == []
    assert tokens_of(trace)[0][:3] == tokens_of(alone)[0][:3]


def test_a_share_to_come_lets_a_waiting_stage_wait() -> None:
    """44 tokens, of which 24 stay at layer 2: 44 + 44 + 24 + 4 + 1 fit into 0.7 of 176, three layers of 44 would not."""
    trace = prefill([RANDOM | {"keep": 0.5}, PRUNE], 0.7)
    assert [stage.site for stage in trace.stages] == ["layer[2].pre_attention", "layer[2].pre_ffn"]


def test_what_comes_too_late_for_the_budget_is_cut_short() -> None:
    trace = prefill([{"strategy": "random", "at": 3}, PRUNE], 0.7)
    assert [stage.site for stage in trace.stages] == ["layer[1].pre_ffn"]
    assert trace.skipped[0].startswith("row 0: random: cut short")


def test_a_stage_with_a_count_of_its_own_cuts_none_short() -> None:
    with pytest.raises(BudgetError, match=r"smallest feasible budget here is 0\.7"):
        prefill([{"strategy": "random", "at": 3}, PRUNE | {"keep": 0.3}], 0.7)


# FLOPs of importance to come ------------------------------------------------------------------------------------------

READERS: dict[str, tuple[list[dict[str, Any]], float]] = {
    "its own share": ([RANDOM | {"at": 0}, PRUNE | {"at": 2, "keep": 0.9}], 0.5),
    "waiting": ([RANDOM | {"at": 0}, PRUNE | {"keep": 0.9}], 0.5),
    "solved": ([RANDOM | {"at": 0}, PRUNE | {"at": 3}], 0.5),
    "cascade": ([PRUNE | {"at": [0, 1, 3]}], 0.75),
    "at the cache": (
        [{"strategy": "similarity_merge", "site": "kv", "until": 1}, PRUNE | {"at": 3, "keep": 0.9}],
        0.95,
    ),
    "same site": ([RANDOM | {"at": 1}, FASTV | {"at": 1, "keep": 0.9}], 0.6),
}


@pytest.mark.parametrize("name", READERS)
def test_a_budget_of_flops_pays_for_importance_to_come(name: str) -> None:
    stages, share = READERS[name]
    trace = prefill(stages, {"flops": share})
    assert trace.selector_flops > 0
    assert trace.relative_flops <= share


SHARES = st.sampled_from([None, 0.15, 0.5, 0.9])


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[int, list[dict[str, Any]], dict[str, float]]:
    depth = draw(st.sampled_from([4, 7]))
    layer = st.integers(1, depth - 1)
    rank = {"importance": draw(st.sampled_from(["cumulative", "last", "window"]))}
    stage = st.one_of(
        st.builds(lambda at, keep: RANDOM | {"at": at, "keep": keep}, layer, SHARES),
        st.builds(lambda at, keep: FASTV | rank | {"at": at, "keep": keep}, layer, SHARES),
        st.builds(lambda keep: PRUNE | rank | {"keep": keep}, SHARES),
        st.builds(lambda at, keep: PRUNE | rank | {"at": sorted(at), "keep": keep}, st.sets(layer, min_size=1), SHARES),
        st.builds(lambda value: MERGE | {"threshold": value}, st.sampled_from([0.3, 0.8])),
        st.builds(lambda keep: MERGE | {"threshold": None, "at": 0, "keep": keep}, st.sampled_from([0.5, 0.9])),
    )
    unit = draw(st.sampled_from(["tokens", "flops", "kv_cache"]))
    return depth, draw(st.lists(stage, min_size=1, max_size=3)), {unit: draw(st.integers(20, 100)) / 100}


def holds(case: tuple[int, list[dict[str, Any]], dict[str, float]]) -> None:
    """What passes the check is never refused by the forward."""
    depth, stages, budget = case
    spent = account(budget, TOTAL, VISION, layers=depth)
    try:
        check(build(load_pipeline({"stages": stages})), spent)
    except (BudgetError, PipelineError):
        return
    trace = prefill(stages, budget, depth)
    share = budget.get("flops", 1.0)
    # A share of one keeps everything, and reads attention all the same.
    assert share == 1 or trace.relative_flops <= share


@given(mixtures())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_mixture_is_refused_late(case: Any) -> None:
    holds(case)


@pytest.mark.slow
@given(mixtures())
@settings(max_examples=5000, deadline=None)
def test_no_mixture_is_refused_late_often(case: Any) -> None:
    holds(case)


AS_ORACLE = [
    Case("fastv, then a share", {"stages": [FASTV, PRUNE | {"keep": 0.4}]}, {"tokens": 0.7}),
    Case("fastv, then the rest", {"stages": [FASTV, PRUNE]}, {"tokens": 0.6}),
    Case("a share, then the rest", {"stages": [RANDOM | {"keep": 0.6}, PRUNE]}, {"tokens": 0.6}),
    Case("cut short", {"stages": [RANDOM | {"at": 5}, PRUNE]}, {"tokens": 0.6}),
    Case("pays for a share", {"stages": [RANDOM | {"at": 0}, PRUNE | {"at": 3, "keep": 0.5}]}, {"flops": 0.6}),
    Case("pays for a cascade", {"stages": [FASTV | {"at": [1, 3, 5]}]}, {"flops": 0.7}),
    Case("pays for one that waits", {"stages": [RANDOM | {"at": 1}, PRUNE | {"keep": 0.3}]}, {"flops": 0.6}),
]


@pytest.mark.parametrize("case", AS_ORACLE, ids=lambda case: case.name)
@pytest.mark.parametrize("prompt", ["single", "ragged"])
def test_the_oracle_agrees(case: Case, prompt: str) -> None:
    given, subject = PROMPTS[prompt](), model()
    with torch.no_grad(), tr.reduce(subject, case.load(), layout=given.layout) as run:
        logits = subject(**given.inputs, position_ids=given.positions).logits
    check_prefill(expect(case, given), logits, run.trace, 1e-6)


# A budget of FLOPs and the LM head ------------------------------------------------------------------------------------


def test_a_budget_of_flops_counts_one_position_of_the_head() -> None:
    """As generate() computes it. A plain forward computes the head on all that is left, and the trace says so."""
    stages = [RANDOM | {"at": 0}]
    share = math.ceil(prefill(stages, {"flops": 0.5}).relative_flops * 1e4) / 1e4
    last, every = (prefill(stages, {"flops": share}, head=head) for head in (1, 0))
    assert tokens_of(last) == tokens_of(every)
    assert last.relative_flops <= share < every.relative_flops
    assert every.flops - last.flops == every.head_flops_per_token * (len(every.kept[0]) - 1)


def test_what_a_merge_may_still_meet_is_decided_by_the_video() -> None:
    """A budget that merging may meet is tried: a video that stands still meets it, noise is refused, and all is as before."""
    late = [MERGE | {"threshold": 0.9}, PRUNE | {"at": 3}]
    model = decoder(4)
    with torch.no_grad(), tr.reduce(model, {"name": "late", "stages": late}, layout=LAYOUT, budget=0.5) as run:
        cache = DynamicCache(config=model.config)
        with pytest.raises(BudgetError, match=r"^pipeline late: budget tokens 0.5 cannot be met: .*\(stage 2\)"):
            model(inputs_embeds=embeddings(LAYOUT, 32, "noise"), past_key_values=cache)
        assert cache.get_seq_length() == 0
        model(inputs_embeds=embeddings(LAYOUT, 32, "static"), past_key_values=cache)
        assert run.trace.relative_tokens[0] <= 0.5
    with pytest.raises(BudgetError, match=r"^pipeline pipeline: budget tokens 0.5 cannot be met: "):
        prefill(late[1:], 0.5)


# Budgets that are named -----------------------------------------------------------------------------------------------

MERGES = st.builds(
    lambda at, site: MERGE | {"threshold": None, "at": sorted(at), "site": site},
    st.sets(st.integers(0, 3), min_size=1, max_size=2),
    st.sampled_from(["pre_attention", "pre_ffn"]),
)
SOLVERS = st.one_of(
    MERGES,
    st.builds(lambda at: {"strategy": "uniform_frames", "at": at}, st.integers(0, 3)),
    st.builds(lambda at: RANDOM | {"at": sorted(at)}, st.sets(st.integers(0, 3), min_size=1, max_size=3)),
    st.builds(lambda at: FASTV | {"at": at}, st.integers(1, 3)),
    st.just(PRUNE),
    st.builds(lambda value: MERGE | {"threshold": value}, st.sampled_from([0.3, 0.8])),
    st.just({"strategy": "similarity_merge", "site": "kv"}),
    st.just({"strategy": "streaming_window", "sinks": 2}),
)


@given(
    st.lists(SOLVERS, min_size=1, max_size=3),
    st.sampled_from(["tokens", "flops", "kv_cache"]),
    st.sampled_from(["mixed", "noise", "static"]),
)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_the_budget_that_a_refusal_names_is_met(stages: list[dict[str, Any]], unit: str, kind: str) -> None:
    """Asked for what was named, once, and whatever the video shows."""
    names_a_budget(stages, unit, kind)


@pytest.mark.slow
@given(
    st.lists(SOLVERS, min_size=1, max_size=3),
    st.sampled_from(["tokens", "flops", "kv_cache"]),
    st.sampled_from(["mixed", "noise", "static"]),
)
@settings(max_examples=5000, deadline=None)
def test_the_budget_that_a_refusal_names_is_met_often(stages: list[dict[str, Any]], unit: str, kind: str) -> None:
    names_a_budget(stages, unit, kind)


def names_a_budget(stages: list[dict[str, Any]], unit: str, kind: str) -> None:
    try:
        prefill(stages, {unit: 0.02}, kind=kind)
    except PipelineError:
        return  # Two stages at one place, or none that solves a count.
    except BudgetError as error:
        named = float(str(error).rpartition("smallest feasible budget here is ")[2])
    else:
        raise AssertionError("five slots and four words are more than 2 % of 44 tokens")
    for other in {kind, "noise", "static"}:
        share = prefill(stages, {unit: named}, kind=other)
        if unit == "tokens":
            assert share.relative_tokens[0] <= named


def test_frames_then_merging_then_pruning_name_one_budget() -> None:
    stages = [{"strategy": "uniform_frames"}, MERGE | {"threshold": None}, PRUNE]
    with pytest.raises(BudgetError) as error:
        prefill(stages, 0.1)
    named = float(str(error.value).rpartition(" ")[2])
    assert tokens_of(prefill(stages, named))[0] == [4 + 5, 4 + 1, 4 + 1, 4 + 1]
    with pytest.raises(BudgetError):
        prefill(stages, round(named - 2e-4, 4))


@pytest.mark.parametrize("stages", [[PRUNE], [{"strategy": "uniform_frames"}], [MERGE | {"threshold": 0.9}, PRUNE]])
def test_least_goes_as_low_as_possible_and_says_so(stages: list[dict[str, Any]]) -> None:
    with (
        torch.no_grad(),
        tr.reduce(decoder(4), {"stages": stages}, layout=LAYOUT, budget=0.02, on_infeasible="least") as run,
    ):
        decoder(4)(inputs_embeds=embeddings(LAYOUT, 32, "noise"))
    held = tokens_of(run.trace)[0]
    assert held[-1] == 4 + (5 if stages[0]["strategy"] == "uniform_frames" else 1)
    assert "row 0: the budget (tokens 0.02) cannot be met" in str(run.trace)
    with (
        torch.no_grad(),
        tr.reduce(decoder(4), {"stages": stages}, layout=LAYOUT, budget=0.9, on_infeasible="least") as run,
    ):
        decoder(4)(inputs_embeds=embeddings(LAYOUT, 32, "noise"))
    assert "cannot be met" not in str(run.trace)


# A plugin that drops tokens from the cache ----------------------------------------------------------------------------


class Evict(Strategy):
    """Drops keys and values of some vision tokens, merging none."""

    name = "evict"
    capabilities = Capabilities(sites=("kv", "pre_attention"), chooses_count=True)
    count: ClassVar[Callable[[Strategy, StageContext], int | None]] = lambda self, ctx: None

    class Config(StageConfig):
        strategy: Literal["evict"] = "evict"
        keep: float | None = None

    def decide(self, ctx: StageContext) -> tr.Reduction:
        return ctx.keep_top(ctx.random(0), type(self).count(self, ctx))


class Plugin:
    @hookimpl
    def tokenreduce_strategies(self) -> list[type[Strategy]]:
        return [Evict, OddKeep]


@pytest.fixture
def evict() -> Iterator[None]:
    plugin = Plugin()
    manager().register(plugin, "test-plugin:evict")
    yield
    manager().unregister(plugin)


@pytest.mark.usefixtures("evict")
@pytest.mark.parametrize("budget", [0.5, {"flops": 0.97}, {"kv_cache": 0.4}], ids=str)
@pytest.mark.parametrize(
    "count", [lambda self, ctx: None, lambda self, ctx: self.keep_count(ctx)], ids=["top", "count"]
)
def test_tokens_may_be_dropped_from_the_cache(budget: Any, count: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more tokens than one block of a span has, whose price is another."""
    monkeypatch.setattr(Evict, "count", count)
    layout = tr.TokenLayout.video(before=4, frames=16, per_frame=20, after=8)
    total = layout.shape[1]
    with (
        torch.no_grad(),
        tr.reduce(decoder(), {"stages": [{"strategy": "evict"}]}, layout=layout, budget=budget) as run,
    ):
        decoder()(inputs_embeds=embeddings(layout, 32, "noise"), logits_to_keep=1)
    spent = account(budget, total, 320)
    strategies = build(load_pipeline({"stages": [{"strategy": "evict"}]}))
    forecast(strategies, spent)
    assert tokens_of(run.trace) == [spent.kv]
    assert spent.cost(spent.attn, spent.ffn, spent.kv, spent.pairs) <= spent.limit
    more = [held + 1 for held in spent.kv]
    assert spent.cost(spent.attn, spent.ffn, more, [total * held for held in more]) > spent.limit


def test_a_forecast_at_the_cache_counts_the_text() -> None:
    stage = Evict(Evict.Config(keep=0.5))
    view = CountView(stage.schedule(4)[0], 4, 50, 40, 40, {}, None)
    assert stage.forecast(view) == Outcome(10 + 20)


class OddKeep(Evict):
    """Its `keep` is no share, and its counts are its own."""

    name = "odd_keep"
    capabilities = Capabilities(sites=("pre_attention",), chooses_count=True)

    class Config(StageConfig):
        strategy: Literal["odd_keep"] = "odd_keep"
        keep: str = "half"

    def keep_count(self, ctx: StageContext | CountView, action: Any = "prune") -> int:
        return ctx.reducible_count // 2

    def decide(self, ctx: StageContext) -> tr.Reduction:
        return ctx.keep_top(ctx.random(0), self.keep_count(ctx))


@pytest.mark.usefixtures("evict")
def test_a_plugin_may_mean_something_else_by_keep() -> None:
    trace = prefill([{"strategy": "odd_keep", "at": 1}, PRUNE], 0.6)
    assert trace.relative_tokens[0] <= 0.6
