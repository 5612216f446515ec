"""Stages at `kv` sites give each row a span and a weighting of its own: a row in a batch is as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import pytest
import torch
from support.tiny import TOKENS, layout, prompt, tiny_model
from torch import Tensor
from transformers import DynamicCache

import tokenreduce as tr
from tokenreduce.errors import PluginError
from tokenreduce.hookspecs import hookimpl
from tokenreduce.plugins import manager
from tokenreduce.strategy import Capabilities, Decision, Span, StageConfig, StageContext, Strategy

EARLY, LATE = layout(), tr.TokenLayout.video(before=7, frames=4, per_frame=5, after=5)
"""Two rows: `first` tells them apart."""
AT = {"strategy": "by_row", "site": "kv", "at": [1, 2]}


class ByRow(Strategy):
    """Does what the test says."""

    name = "by_row"
    capabilities = Capabilities(sites=("kv", "pre_attention"), merges=True, content_dependent=True)
    act: ClassVar[Callable[[StageContext], Any]]

    class Config(StageConfig):
        strategy: Literal["by_row"] = "by_row"

    def decide(self, ctx: StageContext) -> Any:
        return type(self).act(ctx)


class Plugin:
    @hookimpl
    def tokenreduce_strategies(self) -> list[type[Strategy]]:
        return [ByRow]


@pytest.fixture(autouse=True)
def plugin() -> Iterator[None]:
    plugin = Plugin()
    manager().register(plugin, "test-plugin:by_row")
    yield
    manager().unregister(plugin)


def first(ctx: StageContext) -> int:
    return int((ctx.slot >= 0).nonzero()[0])


def merged(ctx: StageContext, pairs: int) -> Tensor:
    """(n,) the second and later tokens of so many pairs go into the first."""
    target = torch.arange(ctx.n)
    for pair in range(pairs):
        target[first(ctx) + pair + 1] = first(ctx)
    return target


def spans(ctx: StageContext) -> Decision:
    return Decision(span=Span(sinks=first(ctx), window=4 + first(ctx)))


def weightings(ctx: StageContext) -> Any:
    if ctx.site.kind == "pre_attention":
        return ctx.merge(merged(ctx, 1))
    return ctx.merge(merged(ctx, 2), "plain" if first(ctx) == 3 else "size")


def mixed(ctx: StageContext) -> Any:
    return spans(ctx) if first(ctx) == 3 else ctx.merge(merged(ctx, 4))


def rows(*layouts: tr.TokenLayout) -> tr.TokenLayout:
    return tr.TokenLayout(
        slot=torch.cat([each.slot for each in layouts]), frame=torch.cat([each.frame for each in layouts])
    )


def call(model: Any, stages: list[Any], where: tr.TokenLayout, ids: Tensor) -> tuple[list[Tensor], tr.Trace]:
    """Logits of a prefill and of a later step, and the receipt."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), tr.reduce(model, {"stages": stages}, layout=where) as run:
        steps = [model(input_ids=ids, past_key_values=cache).logits]
        steps += [model(input_ids=ids[:, :1] + step, past_key_values=cache).logits for step in range(2)]
    return steps, run.trace


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("act", [spans, weightings, mixed])
@pytest.mark.parametrize("turned", [False, True])
def test_a_row_in_a_batch_is_as_if_it_were_alone(act: Any, turned: bool, attention: str) -> None:
    model, ids = tiny_model(attention).double(), prompt(rows=2)
    stages = [{"strategy": "by_row", "site": "pre_attention", "at": 0}, AT] if act is weightings else [AT]
    ByRow.act = staticmethod(act)
    layouts = [LATE, EARLY] if turned else [EARLY, LATE]
    both, trace = call(model, stages, rows(*layouts), ids)
    flops = 0
    for row, its in enumerate(layouts):
        alone, one = call(model, stages, its, ids[row : row + 1])
        for ours, expected in zip(both, alone, strict=True):
            # The softmax of eager attention is in float32, and the masked keys beside a row's own change its rounding.
            atol = 1e-9 if attention == "sdpa" else 5e-6
            torch.testing.assert_close(ours[row : row + 1, -1], expected[:, -1], atol=atol, rtol=0)
        assert [int(layer.tokens[row]) for layer in trace.layers] == [int(layer.tokens[0]) for layer in one.layers]
        flops += sum(layer.flops for layer in one.layers)
    assert sum(layer.flops for layer in trace.layers) == flops


def turns(model: Any, ids: Tensor, later: tr.TokenLayout, change: Callable[[DynamicCache], None]) -> Tensor:
    """Logits of a second turn with another span, where the first one gave four sinks to all."""
    window = {"strategy": "streaming_window", "window": 6}
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        with tr.reduce(model, {"stages": [window | {"sinks": 4}]}, layout=layout()):
            model(input_ids=ids, past_key_values=cache)
        change(cache)
        with tr.reduce(model, {"stages": [window | {"sinks": 1}]}, layout=later):
            return model(input_ids=ids.flip(1), past_key_values=cache).logits  # type: ignore[no-any-return]


def test_a_row_without_vision_tokens_keeps_its_sinks() -> None:
    """Also when the rows change places in between."""
    model, ids, text = tiny_model().double(), prompt(rows=2), tr.TokenLayout.text(1, TOKENS)
    whole = turns(model, ids, rows(text, layout()), lambda cache: None)
    for row, its in enumerate((text, layout())):
        alone = turns(model, ids[row : row + 1], its, lambda cache: None)
        torch.testing.assert_close(whole[row : row + 1], alone, atol=1e-9, rtol=0)
    copied = turns(model, ids[:1].expand(2, -1), rows(text, layout()), lambda cache: None)
    repeated = turns(model, ids[:1].expand(2, -1), rows(text, layout()), twice)
    torch.testing.assert_close(repeated, copied, atol=1e-9, rtol=0)


def twice(cache: DynamicCache) -> None:
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_first_token_that_nothing_is_left_to_attend_to(attention: str) -> None:
    """The kernels disagree about a query without keys: zeros, NaN or the mean of what comes later."""
    model = tiny_model(attention)
    ByRow.act = staticmethod(lambda ctx: tr.Reduction.keep((torch.arange(ctx.n) > 0)[None]))
    where = tr.TokenLayout.video(before=0, frames=4, per_frame=6, after=8)
    with pytest.raises(PluginError, match=r"by_row at layer\[1\].kv leaves the first token of row 0 nothing to attend"):
        call(model, [AT], where, prompt())
