"""A strategy that breaks its contract is named, and the model is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import pytest
import torch
from tiny import (
    BEFORE,
    assert_same,
    forward,
    generate,
    layout,
    logits,
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
from tokenreduce.hookspecs import hookimpl
from tokenreduce.plugins import manager
from tokenreduce.strategy import Capabilities, CountView, Decision, Outcome, Span, StageConfig, StageContext, Strategy


class Double(Strategy):
    """Does what the test says."""

    name = "double"
    capabilities = Capabilities(
        sites=("pre_attention", "pre_ffn", "kv"), merges=True, content_dependent=True, chooses_count=True
    )
    act: ClassVar[Callable[[StageContext], Any]]

    class Config(StageConfig):
        strategy: Literal["double"] = "double"
        keep: float | None = None

    def decide(self, ctx: StageContext) -> Any:
        return type(self).act(ctx)

    def forecast(self, view: CountView) -> Outcome:
        return Outcome(min(view.allowance(), view.reducible_count) if view.allowance_source else view.reducible_count)


class Plugin:
    @hookimpl
    def tokenreduce_strategies(self) -> list[type[Strategy]]:
        return [Double]


@pytest.fixture(autouse=True)
def plugin() -> Iterator[None]:
    plugin = Plugin()
    manager().register(plugin, "test-plugin:double")
    yield
    manager().unregister(plugin)


def target_of(ctx: StageContext, changes: dict[int, int]) -> tr.Reduction:
    target = torch.arange(ctx.n)
    for token, into in changes.items():
        target[token] = into
    return ctx.merge(target)


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
    "too_short": (lambda ctx: ctx.merge(torch.arange(ctx.n - 1)), r"reduction of \(1, 31\) tokens, expected \(1, 32\)"),
    "no_batch": (lambda ctx: tr.Reduction(torch.arange(ctx.n)), r"reduction of \(32,\) tokens, expected \(1, 32\)"),
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
    expected = PipelineError if "attention" in fault else PluginError
    pipeline = {"name": "faulty", "stages": [{"strategy": "double", "at": 1, "keep": 1.0}]}
    with pytest.raises(expected, match=match) as caught, tr.reduce(model, pipeline, layout=two):
        generate(model)
    assert "\n" not in str(caught.value)
    assert_same(model, before)
    assert torch.equal(logits(model), dense)


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
