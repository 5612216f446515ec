"""The schedule: which stage is asked where, and that a real forward spends what the forecast said, at any depth."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from fractions import Fraction
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoders import KINDS, account, decoder, embeddings, tokens_of

import tokenreduce as tr
from tokenreduce.errors import BudgetError, PipelineError
from tokenreduce.pipeline import Pipeline, build, load_pipeline
from tokenreduce.planning.account import Account
from tokenreduce.planning.feasibility import check
from tokenreduce.planning.schedule import Conductor, forecast
from tokenreduce.strategy import (
    Capabilities,
    CountView,
    Decision,
    Outcome,
    Site,
    StageConfig,
    StageContext,
    Strategy,
)

FRAMES, PER_FRAME, BEFORE, AFTER = 9, 11, 6, 5
LAYOUT = tr.TokenLayout.video(before=BEFORE, frames=FRAMES, per_frame=PER_FRAME, after=AFTER)
TOTAL, VISION = LAYOUT.shape[1], FRAMES * PER_FRAME
DEPTHS = [12, 28, pytest.param(64, marks=pytest.mark.slow), pytest.param(80, marks=pytest.mark.slow)]
CHOOSERS = ["fastv", "random", "prune_only", "streaming_llm", "merge_only", "noncascaded_merge", "uniform_frames"]
KV_ONLY = {"streaming_llm": 1.0, "noncascaded_merge": 0.95}
"""FLOPs to ask of stages that leave hidden states alone; a span saves none on inputs shorter than its block."""
BUDGETS: list[Any] = [0.5, {"flops": 0.5}, {"kv_cache": 0.6}, {"tokens": 60}, {"tokens": 0.4, "of": "vision"}]


def prefill(
    depth: int, pipeline: Any, budget: Any, kind: str = "mixed", seed: int = 0, layout: Any = LAYOUT
) -> tr.Trace:
    model = decoder(depth, hidden=16)
    with torch.no_grad(), tr.reduce(model, pipeline, layout=layout, budget=budget) as run:
        model(inputs_embeds=embeddings(layout, 16, kind, seed), logits_to_keep=1)
    return run.trace


def planned(depth: int, pipeline: Any, budget: Any, **facts: Any) -> Account:
    spent = account(budget, TOTAL, VISION, layers=depth, hidden=16)
    strategies = build(load_pipeline(pipeline))
    check(strategies, spent)
    forecast(strategies, spent, frames=FRAMES, **facts)
    return spent


def absolute(budget: Any, depth: int) -> Any:
    """The budget with kv_cache given in bytes instead."""
    if isinstance(budget, dict) and "kv_cache" in budget:
        shape = account(None, 1, 1, layers=depth, hidden=16).shape
        return {"kv_cache": int(budget["kv_cache"] * 2 * shape.kv_heads * shape.head_dim * TOTAL * depth * 8)}
    return budget


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("name", CHOOSERS)
def test_trace_is_the_forecast_to_the_token(name: str, budget: Any, depth: int) -> None:
    if budget == {"flops": 0.5}:
        budget = {"flops": KV_ONLY.get(name, 0.5)}
    budget = absolute(budget, depth)
    spent = planned(depth, name, budget)
    trace = prefill(depth, name, budget)
    assert tokens_of(trace) == [spent.kv]
    assert [int(layer.ffn_tokens) for layer in trace.layers] == spent.ffn
    assert trace.selector_flops == spent.selector_flops
    assert spent.cost(spent.attn, spent.ffn, spent.kv, spent.pairs) <= spent.limit


MULTI: list[dict[str, Any]] = [
    {"stages": [{"strategy": "fastv", "at": [2, 5, 8]}]},
    {"stages": [{"strategy": "fastv", "at": [2, 5, 8], "keep": [0.8, 0.5, 0.25]}]},
    {"stages": [{"strategy": "random", "at": 0, "keep": 0.9}, {"strategy": "importance_prune", "at": 3}]},
    {"stages": [{"strategy": "importance_prune", "at": [1, 4], "importance": "window", "window": 7, "heads": "max"}]},
    {"stages": [{"strategy": "uniform_frames", "keep": 0.8}, {"strategy": "random", "at": 2, "site": "pre_ffn"}]},
]


@pytest.mark.parametrize("pipeline", MULTI, ids=lambda p: "+".join(stage["strategy"] for stage in p["stages"]))
@pytest.mark.parametrize("budget", [0.6, {"flops": 0.6}], ids=str)
def test_several_sites_are_forecast_to_the_token(pipeline: dict[str, Any], budget: Any) -> None:
    asked = budget if "keep" not in str(pipeline) or len(pipeline["stages"]) > 1 else None
    spent = planned(12, pipeline, asked)
    assert tokens_of(prefill(12, pipeline, asked)) == [spent.kv]


def assert_met(trace: tr.Trace, budget: Any, depth: int, layout: tr.TokenLayout = LAYOUT) -> None:
    """Never above the budget; one more token in every layer would be above."""
    total, vision = layout.shape[1], int(layout.reducible().sum())
    spent = account(budget, total, vision, layers=depth, hidden=16)
    kv, ffn = tokens_of(trace)[0], [int(layer.ffn_tokens) for layer in trace.layers]
    spent.selector_flops = trace.selector_flops
    none = [None] * depth
    assert spent.cost(kv, ffn, kv, none) <= spent.limit
    more, wider = ([min(count + 1, total) for count in counts] for counts in (kv, ffn))
    assert more == kv or spent.cost(more, wider, more, none) > spent.limit


VIDEO_BUDGETS = [0.28, 0.5, 0.9, {"flops": 0.4}, {"kv_cache": 0.35}, {"tokens": 45}, {"tokens": 0.3, "of": "vision"}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", VIDEO_BUDGETS, ids=str)
def test_merging_meets_the_budget_whatever_the_video(kind: str, budget: Any) -> None:
    for seed in range(2):
        assert_met(prefill(12, "framefusion", budget, kind, seed), budget, 12)


@pytest.mark.parametrize("depth", DEPTHS[1:])
@pytest.mark.parametrize("budget", [0.3, {"flops": 0.3}, {"kv_cache": 0.3}], ids=str)
def test_merging_meets_the_budget_at_any_depth(depth: int, budget: Any) -> None:
    for kind in ("static", "mixed", "drift"):
        assert_met(prefill(depth, "framefusion", budget, kind), budget, depth)


@st.composite
def merging_runs(draw: st.DrawFn) -> tuple[str, int, Any, dict[str, Any], int]:
    unit = draw(st.sampled_from(["tokens", "flops", "kv_cache"]))
    stages = {
        "stages": [
            {
                "strategy": "similarity_merge",
                "threshold": draw(st.sampled_from([-1.0, 0.0, 0.5, 0.6, 0.9, 1.0])),
                "stop_below": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
                "merge_below": draw(st.booleans()),
                "weighting": draw(st.sampled_from(["size", "plain"])),
            },
            {"strategy": "importance_prune", "importance": draw(st.sampled_from(["last", "cumulative"]))},
        ]
    }
    budget = {unit: draw(st.integers(15, 100)) / 100}
    return draw(st.sampled_from(KINDS)), draw(st.integers(2, 12)), budget, stages, draw(st.integers(0, 99))


def meets(case: tuple[str, int, Any, dict[str, Any], int]) -> None:
    kind, depth, budget, pipeline, seed = case
    try:
        every = check(build(load_pipeline(pipeline)), account(budget, TOTAL, VISION, layers=depth, hidden=16))
    except BudgetError:
        return
    # What passes the check for every video never fails because of one; what may fail is refused, and never above its budget.
    with nullcontext() if every else suppress(BudgetError):
        assert_met(prefill(depth, pipeline, budget, kind, seed), budget, depth)


@given(merging_runs())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_any_merge_then_prune_meets_its_budget(case: tuple[str, int, Any, dict[str, Any], int]) -> None:
    meets(case)


@pytest.mark.slow
@given(merging_runs())
@settings(max_examples=2000, deadline=None)
def test_any_merge_then_prune_meets_its_budget_often(case: tuple[str, int, Any, dict[str, Any], int]) -> None:
    meets(case)


# Rules of the schedule, with stages that only say what they are told --------------------------------------------------


class Told(Strategy):
    """Does nothing but follow `script`: per look, what its Outcome says."""

    name = "told"
    capabilities = Capabilities(sites=("pre_ffn", "pre_attention"), chooses_count=True)
    script: list[Outcome]

    class Config(StageConfig):
        strategy: Literal["told"] = "told"

    def decide(self, ctx: StageContext) -> Decision | None:
        return None

    def forecast(self, view: CountView) -> Outcome:
        turn = view.state["turn"] = view.state.get("turn", -1) + 1
        return self.script[min(turn, len(self.script) - 1)]


class Waiting(Told):
    """The same, once, after the stages before it."""

    name = "waiting"
    capabilities = Capabilities(sites=("pre_ffn", "pre_attention"), chooses_count=True, waits=True)


def told(cls: type[Told], script: list[Outcome], **config: Any) -> Told:
    stage = cls(Told.Config(strategy="told", **config))
    stage.script = script
    return stage


def looks(*stages: Strategy, budget: Any = None) -> tuple[list[list[str]], Conductor]:
    """Per stage, the sites at which it was asked in a decoder of 6 layers."""
    seen: list[list[str]] = [[] for _ in stages]

    class Watched(Conductor):
        def record(self, run: Any, site: Site, *args: Any, **kwargs: Any) -> None:
            seen[self.runs.index(run)].append(str(site))
            super().record(run, site, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenreduce.planning.schedule.Conductor", Watched)
        conductor = forecast(stages, account(budget, 100, 90, layers=6))
    return seen, conductor


def test_a_stage_is_asked_until_it_says_that_it_is_done() -> None:
    stage = told(Told, [Outcome(80), Outcome(70), Outcome(60, finished=True)])
    seen, conductor = looks(stage)
    assert seen == [["layer[0].pre_ffn", "layer[1].pre_ffn", "layer[2].pre_ffn"]]
    assert conductor.account.kv == [100, 90, 80, 70, 70, 70]
    assert conductor.account.ffn == [90, 80, 70, 70, 70, 70]


@pytest.mark.parametrize(("consumed", "layer"), [(True, 3), (False, 2)])
def test_a_waiting_stage_starts_after_a_look_or_in_place_of_one(consumed: bool, layer: int) -> None:
    first = told(Told, [Outcome(80), Outcome(70), Outcome(60, finished=True, consumed=consumed)])
    second = told(Waiting, [Outcome(5)])
    seen, _ = looks(first, second)
    assert seen[1] == [f"layer[{layer}].pre_ffn"]


def test_stages_after_a_met_budget_are_skipped_and_say_so() -> None:
    first = told(Told, [Outcome(50, finished=True, budget_met=True)])
    seen, conductor = looks(first, told(Waiting, [Outcome(5)]), told(Told, [Outcome(5)], at=4))
    assert seen[1:] == [[], []]
    assert [run.note for run in conductor.runs[1:]] == ["skipped: told met the budget"] * 2
    assert conductor.unfinished() == []


def test_a_waiting_stage_does_not_wait_beyond_what_the_budget_allows() -> None:
    """600 token·layers at 0.5 are 300: two layers at 100 and four at 11 fit, three at 100 do not leave 11 a layer."""
    first = told(Told, [Outcome(90)])
    seen, conductor = looks(first, told(Waiting, [Outcome(1)]), budget=0.5)
    assert seen[1] == ["layer[1].pre_ffn"]
    assert seen[0] == ["layer[0].pre_ffn", "layer[1].pre_ffn"]
    assert conductor.runs[0].note.startswith("cut short: the budget leaves")
    assert conductor.account.kv == [100, 100, 11, 11, 11, 11]


def test_a_waiting_stage_acts_at_its_last_site_at_the_latest() -> None:
    seen, _ = looks(told(Told, [Outcome(90)]), told(Waiting, [Outcome(1)]))
    assert seen[1] == ["layer[5].pre_ffn"]


def test_stages_of_one_site_are_asked_in_the_order_of_the_pipeline() -> None:
    first, second = told(Told, [Outcome(50)], at=2), told(Told, [Outcome(30)], at=2)
    assert looks(first, second)[1].account.kv == [100, 100, 100, 40, 40, 40]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"strategy": "random", "at": 6}, "random acts at layer 6, but the model has layers 0 … 5"),
        ({"strategy": "fastv", "at": [2, 9]}, "fastv acts at layer 9, but the model has layers 0 … 5"),
        ({"strategy": "fastv", "at": 0}, "fastv reads attention, and before layer 0 there is none"),
        ({"strategy": "importance_prune", "from": 7}, "acts at no layer of a model of 6 layers"),
        ({"strategy": "fastv", "at": [2, 3], "keep": [0.5]}, "`keep` has 1 shares for 2 layers in `at`"),
    ],
)
def test_schedules_that_no_model_of_6_layers_has(stage: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError) as error:
        prefill(6, {"stages": [stage]}, None if "keep" in stage else 0.6)
    assert message in str(error.value)


def test_a_budget_is_refused_before_anything_runs() -> None:
    model = decoder(6, hidden=16)
    pipeline: Pipeline = load_pipeline("fastv")
    with pytest.raises(BudgetError, match=r"smallest feasible budget here is 0\.4"):
        tr.reduce(model, pipeline, layout=LAYOUT, budget=0.2)
    trace = prefill(6, "fastv", 0.45)
    assert Fraction(sum(tokens_of(trace)[0]), 6 * TOTAL) <= Fraction(45, 100)


@pytest.mark.parametrize("name", ["merge_only", "noncascaded_merge", "uniform_frames"])
def test_a_refusal_in_the_forward_names_a_budget_that_can_be_met(name: str) -> None:
    """What only the layout's frames tell: merging leaves a token per slot, and one frame is the least."""
    share = 0.15  # Eleven tokens of text and five of the eleven slots.
    with pytest.raises(BudgetError) as error:
        prefill(6, name, share)
    least = float(str(error.value).rpartition(" ")[2])
    assert least > share
    assert sum(tokens_of(prefill(6, name, least))[0]) == 6 * (BEFORE + AFTER + PER_FRAME)
    with pytest.raises(BudgetError):
        prefill(6, name, round(least - 2e-4, 4))
