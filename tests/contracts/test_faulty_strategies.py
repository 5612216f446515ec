"""A strategy that breaks its contract is named, and the model is as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import model_validator
from support.double import Double, plugin  # noqa: F401
from support.tiny import (
    BEFORE,
    TOKENS,
    assert_same,
    forward,
    generate,
    layout,
    logits,
    prompt,
    snapshot,
    tiny_model,
)
from torch import nn

import tokenreduce as tr
from tokenreduce.errors import (
    NotFiredError,
    PipelineError,
    PluginError,
    TokenReduceError,
    UnsupportedError,
)
from tokenreduce.pipeline import Pipeline, build, load_pipeline, pipeline_problems
from tokenreduce.strategy import (
    Decision,
    Outcome,
    Site,
    Span,
    StageContext,
)


def target_of(ctx: StageContext, changes: dict[int, int]) -> tr.Reduction:
    target = torch.arange(ctx.n)
    for token, into in changes.items():
        target[token] = into
    return ctx.merge(target)


def raised(error: Exception) -> Any:
    raise error


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def after(write: Callable[[StageContext], Any], call: Callable[[StageContext], Any]) -> Callable[[StageContext], Any]:
    """A strategy that writes to what it is shown, and then does as `call`."""

    def act(ctx: StageContext) -> Any:
        write(ctx)
        return call(ctx)

    return act


def half(ctx: StageContext) -> tr.Reduction:
    return ctx.keep_top(ctx.random(0), ctx.reducible_count // 2)


FIRST = BEFORE  # The first vision token.
FAULTS: dict[str, tuple[Callable[[StageContext], Any], str]] = {
    "drops_text": (
        lambda ctx: target_of(ctx, {0: -1}),
        r"strategy double at layer\[1\].pre_attention removes a token that must stay \(text or protected\)",
    ),
    "merges_text": (lambda ctx: target_of(ctx, {0: FIRST}), "removes a token that must stay"),
    "merges_into_text": (lambda ctx: target_of(ctx, {FIRST: 0}), "merges a token into text or into another medium"),
    "merges_across_media": (
        lambda ctx: target_of(ctx, {FIRST + 12: FIRST}),
        "merges a token into text or into another medium",
    ),
    "merges_into_a_dropped_token": (
        lambda ctx: target_of(ctx, {FIRST: -1, FIRST + 1: FIRST}),
        r"strategy double at layer\[1\].pre_attention: Reduction.target merges token 4 .* into 3, which does not stay",
    ),
    "too_short": (lambda ctx: ctx.merge(torch.arange(ctx.n - 1)), r"reduction of \(1, 31\), expected \(1, 32\)"),
    "no_batch": (lambda ctx: tr.Reduction(torch.arange(ctx.n)), r"reduction of \(32,\), expected \(1, 32\)"),
    "floats": (lambda ctx: tr.Reduction(torch.arange(ctx.n)[None].float()), "must be a .* long tensor"),
    "out_of_range": (lambda ctx: target_of(ctx, {FIRST: 99}), "must lie in"),
    "wrong_counts": (
        lambda ctx: tr.Reduction.keep(torch.ones(1, ctx.n, dtype=torch.bool), counts=(7,)),
        "Reduction says counts",
    ),
    "hidden_merge": (
        lambda ctx: tr.Reduction(target_of(ctx, {FIRST + 1: FIRST}).target, merges=False),
        "Reduction says merges=False, but merges tokens",
    ),
    "a_mask": (lambda ctx: torch.ones(ctx.n), "returned a Tensor, not a Decision"),
    "a_span": (lambda ctx: Decision(span=Span(1, 2)), "returned a span, which only a stage at a `kv` site can have"),
    "raises": (lambda ctx: {}["missing"], "strategy double at .* failed: KeyError: 'missing'"),
    "raises_many_lines": (lambda ctx: raised(ValueError("a\nb\n c")), "failed: ValueError: a b c$"),
    "refuses_in_many_lines": (
        lambda ctx: raised(PluginError("a\nb")),
        "strategy double at .* failed: PluginError: a b$",
    ),
    "raises_what_has_no_text": (lambda ctx: raised(MuteError()), "failed: MuteError: its text cannot be had"),
    "declares_text_reducible": (
        after(lambda ctx: ctx.reducible.fill_(True), lambda ctx: target_of(ctx, {0: -1})),
        "removes a token that must stay",
    ),
    "declares_one_medium": (
        after(lambda ctx: ctx.medium.fill_(0), lambda ctx: target_of(ctx, {FIRST + 12: FIRST})),
        "merges a token into text or into another medium",
    ),
    "writes_to_hidden": (
        after(lambda ctx: ctx.hidden.mul_(0), half),
        r"strategy double at layer\[1\].pre_attention changed ctx.hidden in place, .* work on ctx.hidden.clone\(\)",
    ),
    "writes_to_a_view_of_hidden": (
        after(lambda ctx: ctx.hidden.detach()[2:, :3].t().fill_(1), half),
        "changed ctx.hidden in place",
    ),
    "no_target": (lambda ctx: tr.Reduction(None), "must be a .* long tensor, got a NoneType"),  # type: ignore[arg-type]
    "a_list": (lambda ctx: tr.Reduction([[0]]), "must be a .* long tensor, got a list"),  # type: ignore[arg-type]
    "another_device": (
        lambda ctx: tr.Reduction(torch.arange(ctx.n, device="meta")[None]),
        "returned a reduction on meta, but its tokens are on cpu",
    ),
    "sparse": (lambda ctx: tr.Reduction(torch.arange(ctx.n)[None].to_sparse()), "long tensor, got torch.sparse_coo"),
    "weighting": (
        lambda ctx: ctx.merge(torch.arange(ctx.n), "junk"),  # type: ignore[arg-type]
        "strategy double at .*: Reduction.weighting must be size, plain or keep_first, got 'junk'",
    ),
    "counts_number": (
        lambda ctx: tr.Reduction(torch.arange(ctx.n)[None], counts=ctx.n),  # type: ignore[arg-type]
        "Reduction.counts must be a tuple of one whole number per row, got a int",
    ),
    "counts_floats": (
        lambda ctx: tr.Reduction(torch.arange(ctx.n)[None], counts=(float(ctx.n),)),  # type: ignore[arg-type]
        "Reduction.counts must be a tuple of one whole number per row, got a float",
    ),
    "merges_none": (
        lambda ctx: tr.Reduction(half(ctx).target, merges=None),  # type: ignore[arg-type]
        "Reduction.merges must be True or False, got a NoneType",
    ),
    "a_decision_with_a_tensor": (
        lambda ctx: Decision(torch.ones(ctx.n)),  # type: ignore[arg-type]
        "strategy double at .* returned a Decision whose reduction is a Tensor, not a Reduction",
    ),
    "finished_text": (
        lambda ctx: Decision(finished="no"),  # type: ignore[arg-type]
        r"strategy double at .* returned Decision\(finished='no'\); it must be True or False",
    ),
    "finished_tensor": (
        lambda ctx: Decision(finished=torch.ones(20, 20).bool()),  # type: ignore[arg-type]
        r"returned Decision\(finished=tensor\(.*\); it must be True or False",
    ),
    "consumed_none": (
        lambda ctx: Decision(consumed=None),  # type: ignore[arg-type]
        r"returned Decision\(consumed=None\); it must be True or False",
    ),
    "note_none": (
        lambda ctx: Decision(note=None),  # type: ignore[arg-type]
        "returned a Decision whose note is a NoneType, not text",
    ),
    "short_scores": (
        lambda ctx: ctx.keep_top(torch.rand(ctx.n - 2), 5),
        r"strategy double at .* failed: ValueError: keep_top needs one score per token, \(32,\), got \(30,\)",
    ),
    "negative_count": (lambda ctx: ctx.keep_top(ctx.random(0), -3), "a whole number of tokens from 0, got -3"),
    "half_a_query": (
        lambda ctx: ctx.attention(2.5),
        "or a tensor of places, got 2.5",
    ),  # type: ignore[arg-type]
    "no_query": (
        lambda ctx: ctx.attention(0),
        "or a tensor of places, got 0",
    ),
    "median_heads": (
        lambda ctx: ctx.attention("last", "median"),  # type: ignore[arg-type]
        "heads must be mean, max or each, got 'median'",
    ),
    "reads_attention_it_did_not_ask_for": (
        lambda ctx: ctx.attention(),
        "no attention has been computed before this site",
    ),
}


def act(call: Callable[[StageContext], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Double, "act", staticmethod(call), raising=False)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, match = FAULTS[fault]
    act(call, monkeypatch)
    model, two = tiny_model(), layout()
    medium = torch.where(two.vision, (two.frame >= 2).long(), -1)  # Two videos of two frames.
    two = tr.TokenLayout(slot=two.slot, frame=two.frame, medium=medium)
    before, dense = snapshot(model), logits(model)
    expected = PipelineError if fault.startswith("reads_attention") else PluginError
    pipeline = {"name": "faulty", "stages": [{"strategy": "double", "at": 1, "keep": 1.0}]}
    with pytest.raises(expected, match=match) as caught, tr.reduce(model, pipeline, layout=two):
        generate(model)
    assert "\n" not in str(caught.value)
    assert_same(model, before)
    assert torch.equal(logits(model), dense)


SPANS: dict[str, tuple[Any, str]] = {
    "negative": (Decision(span=Span(-1, -2)), "span with sinks=-1; it must be a whole number from 0"),
    "empty": (Decision(span=Span(0, 0)), "span with window=0; it must be a whole number from 1"),
    "fractions": (Decision(span=Span(1, 2.5)), "span with window=2.5; it must"),  # type: ignore[arg-type]
    "text": (Decision(span=Span("a", "b")), "span with sinks='a'; it must"),  # type: ignore[arg-type]
    "infinite": (Decision(span=Span(1, float("inf"))), "span with window=inf; it must"),  # type: ignore[arg-type]
    "endless": (Decision(span=Span(1, 1 << 63)), "span with window=9223372036854775808; it must"),
    "a_truth": (Decision(span=Span(True, 4)), "span with sinks=True; it must"),
    "a_pair": (Decision(span=(1, 2)), "a Decision whose span is a tuple, not a Span"),  # type: ignore[arg-type]
    "and_a_reduction": (
        Decision(tr.Reduction(torch.arange(TOKENS)[None]), Span(1, 6)),
        "a span and a reduction; a decision is one or the other",
    ),
}


@pytest.mark.parametrize("fault", SPANS)
def test_a_span_that_is_none(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, match = SPANS[fault]
    act(lambda ctx: answer, monkeypatch)
    model = tiny_model()
    before, dense = snapshot(model), logits(model)
    pipeline = {"stages": [{"strategy": "double", "at": 1, "site": "kv", "keep": 1.0}]}
    with (
        pytest.raises(PluginError, match=rf"strategy double at layer\[1\].kv returned .*{match}") as caught,
        tr.reduce(model, pipeline, layout=layout()),
    ):
        generate(model)
    assert "\n" not in str(caught.value)
    assert_same(model, before)
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("site", ["pre_attention", "pre_ffn", "kv"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_hidden_states_are_not_written_to_unseen(site: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At layer 0 they can be the caller's own embeddings."""
    act(lambda ctx: ctx.hidden.mul_(0), monkeypatch)
    model = tiny_model()
    before = snapshot(model)
    pipeline = {"stages": [{"strategy": "double", "at": 0, "site": site, "keep": 1.0}]}
    expected = pytest.raises(PluginError, match=rf"double at layer\[0\].{site} changed ctx.hidden in place")
    with mode(), expected, tr.reduce(model, pipeline, layout=layout()):
        model(inputs_embeds=model.get_input_embeddings()(prompt()) * 1)
    assert_same(model, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("at", [1, [1, 2]])
def test_the_facts_are_the_strategys_own(mode: Any, at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does to them, and to its context, changes nothing: neither the tokens nor the caller's layout."""

    def scribble(ctx: StageContext) -> tr.Reduction:
        answer = half(ctx)
        for fact in (ctx.slot, ctx.frame, ctx.medium, ctx.position, ctx.size):
            fact.fill_(7)
        ctx.reducible.logical_not_()
        ctx.hidden = ctx.hidden[:1]
        return answer

    model, given = tiny_model(), layout()
    found = []
    for call in (half, scribble):
        act(call, monkeypatch)
        pipeline = {"stages": [{"strategy": "double", "at": at, "keep": 1.0}]}
        with mode(), tr.reduce(model, pipeline, layout=given) as attached:
            found.append((model(input_ids=prompt(rows=2)).logits, attached.trace.source))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert torch.equal(given.slot, layout().slot)
    assert torch.equal(given.frame, layout().frame)


def unknown(*_: Any) -> Any:
    return {}["x"]


METHODS: dict[str, tuple[str, Any, str]] = {
    "schedule_raises": ("schedule", unknown, "its schedule failed: KeyError: 'x'"),
    "schedule_none": ("schedule", lambda *_: None, "its schedule must be a list of at least one Site, got None"),
    "schedule_empty": ("schedule", lambda *_: [], r"its schedule must be a list of at least one Site, got \[\]"),
    "schedule_pairs": (
        "schedule",
        lambda *_: [(1, "kv")],
        "its schedule must be a list of at least one Site, got .*kv",
    ),
    "schedule_late": (
        "schedule",
        lambda *_: [Site(99, "kv")],
        r"its schedule has \(99, 'kv'\), but it can act at .* 0 … 3",
    ),
    "schedule_early": ("schedule", lambda *_: [Site(-1, "kv")], r"its schedule has \(-1, 'kv'\)"),
    "schedule_nowhere": ("schedule", lambda *_: [Site(1, "pre")], r"its schedule has \(1, 'pre'\)"),  # type: ignore[arg-type]
    "schedule_twice": (
        "schedule",
        lambda *_: [Site(1, "kv")] * 2,
        "must name its sites in growing order without repeats",
    ),
    "schedule_back": (
        "schedule",
        lambda *_: [Site(1, "pre_ffn"), Site(1, "pre_attention")],
        "must name its sites in growing order without repeats",
    ),
    "forecast_raises": ("forecast", unknown, r"at layer\[1\].pre_attention: its forecast failed: KeyError: 'x'"),
    "forecast_none": ("forecast", lambda *_: None, "its forecast must be an Outcome, got None"),
    "forecast_fraction": ("forecast", lambda *_: Outcome(3.7), "its forecast is 3.7 tokens; it must be"),  # type: ignore[arg-type]
    "forecast_negative": ("forecast", lambda *_: Outcome(-1), "its forecast is -1 tokens; it must be"),
    "forecast_more": (
        "forecast",
        lambda *_: Outcome(25),
        "its forecast is 25 tokens; it must be a whole number from 0 to",
    ),
    "forecast_flag": ("forecast", lambda *_: Outcome(1, finished="no"), r"Outcome\(finished='no'\)"),  # type: ignore[arg-type]
    "needs_budget_raises": ("needs_budget", unknown, "its needs_budget failed: KeyError: 'x'"),
    "needs_budget_none": ("needs_budget", lambda *_: None, "its needs_budget must be True or False, got None"),
    "once_raises": ("once", property(unknown), "its once failed: KeyError: 'x'"),
    "fixed_count_text": ("fixed_count", property(lambda *_: "yes"), "its fixed_count must be True or False, got 'yes'"),
    "constructor_sets_nothing": ("__init__", lambda *_: None, "failed: AttributeError: .* has no attribute 'config'"),
}


@pytest.mark.parametrize("fault", METHODS)
def test_a_strategy_whose_other_methods_break(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found when it is attached, before anything runs."""
    method, answer, match = METHODS[fault]
    act(half, monkeypatch)
    monkeypatch.setattr(Double, method, answer)
    model = tiny_model()
    before = snapshot(model)
    pipeline = {"budget": 0.8, "stages": [{"strategy": "double", "at": 1}]}
    with pytest.raises(PluginError, match=f"strategy double.*{match}") as caught:
        tr.reduce(model, pipeline, layout=layout())
    assert "\n" not in str(caught.value)
    assert_same(model, before)


def test_a_strategy_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Double, "__init__", lambda self, config: raised(ValueError("a\nb")))
    pipeline = {"stages": [{"strategy": "double", "at": 1}]}
    line = "stages[0]: strategy double: its constructor failed: ValueError: a b"
    assert [problem.removeprefix("pipeline: ") for problem in pipeline_problems(pipeline)] == [line]
    stage = Double.Config(strategy="double")
    with pytest.raises(PluginError, match="strategy double: its constructor failed: ValueError: a b"):
        build(Pipeline.model_construct(stages=[stage]))


def test_a_config_whose_validator_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Double.Config):
        @model_validator(mode="after")
        def _broken(self) -> Any:
            return unknown()

    monkeypatch.setattr(Double, "Config", Broken)
    with pytest.raises(PipelineError, match=r"stages\[0\]: double: a validator of its Config failed: KeyError: 'x'"):
        load_pipeline({"stages": [{"strategy": "double", "at": 1}]})


@pytest.mark.parametrize(
    ("carry", "match"),
    [(unknown, "its carry failed: KeyError: 'x'"), (lambda *_: 5, "its carry must be a Carry or None, got 5")],
)
def test_a_carry_that_is_none(carry: Any, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Double, "carry", carry)
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(PluginError, match=f"strategy double: {match}"):
        tr.stream(model, {"stages": [{"strategy": "double", "at": 0, "keep": 1.0}]})
    assert_same(model, before)


@pytest.mark.parametrize("site", ["pre_attention", "pre_ffn", "kv"])
def test_a_stage_that_exceeds_its_allowance(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    act(lambda ctx: ctx.keep_top(ctx.random(0), ctx.reducible_count - 1), monkeypatch)
    model = tiny_model()
    before, dense = snapshot(model), logits(model)
    pipeline = {"name": "greedy", "budget": 0.8, "stages": [{"strategy": "double", "at": 1, "site": site}]}
    with (
        pytest.raises(TokenReduceError, match=r"pipeline greedy held 0.9\d* of row 0, above its budget .*allowance"),
        tr.reduce(model, pipeline, layout=layout()),
    ):
        generate(model)
    assert_same(model, before)
    assert torch.equal(logits(model), dense)


def test_ctrl_c_in_a_stage_stays_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(ctx: StageContext) -> None:
        raise KeyboardInterrupt

    act(interrupt, monkeypatch)
    model = tiny_model()
    before = snapshot(model)
    pipeline = {"stages": [{"strategy": "double", "at": 1, "keep": 1.0}]}
    with pytest.raises(KeyboardInterrupt), tr.reduce(model, pipeline, layout=layout()):
        generate(model)
    assert_same(model, before)


@pytest.mark.parametrize(
    ("layer", "error", "match"),
    [
        (3, NotFiredError, "stage random never acted on row 0, which has 24 vision tokens"),
        (1, UnsupportedError, "only 2 of its 4 layers ran"),
    ],
)
def test_a_decoder_that_leaves_layers_out(layer: int, error: type[TokenReduceError], match: str) -> None:
    """Layer dropping: a stage that was to act later has not fired, and that is an error, not silence."""

    class Dropping(nn.ModuleList):
        def __getitem__(self, place: Any) -> Any:
            return list(self)[:2] if isinstance(place, slice) else super().__getitem__(place)

    model = tiny_model()
    before = snapshot(model)
    pipeline = {"name": "late", "stages": [{"strategy": "random", "at": layer, "keep": 0.5}]}
    with tr.reduce(model, pipeline, layout=layout()):
        model.model.layers.__class__ = Dropping
        with pytest.raises(error, match=match):
            forward(model)
        model.model.layers.__class__ = nn.ModuleList
        forward(model)
    assert_same(model, before)
