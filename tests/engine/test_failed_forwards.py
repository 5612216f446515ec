"""A forward that fails leaves a user's KV cache as it was, or, where that cannot be, one that is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.double import Double, plugin  # noqa: F401
from support.tiny import TOKENS, forward, layout, prompt, tiny_model
from torch import Tensor
from transformers import DynamicCache

import tokenreduce as tr
from tokenreduce.engine.cache.adopt import adopt, forget_plans
from tokenreduce.engine.cache.layers import KvPlan
from tokenreduce.errors import BudgetError, PipelineError, UnsupportedError

WINDOW = {"stages": [{"strategy": "streaming_window", "sinks": 2, "window": 6, "from": 1}]}
MERGE_KV = {"stages": [{"strategy": "similarity_merge", "site": "kv", "at": [1, 2], "keep": 0.5}]}


class StopError(Exception):
    """An error that is not ours."""


@contextmanager
def stopping(model: Any, layer: int = 2) -> Iterator[None]:
    """After `layer`; before any of them where it is −1."""

    def stop(*_: Any) -> None:
        raise StopError

    layers = model.model.layers
    handle = layers[0].register_forward_pre_hook(stop) if layer < 0 else layers[layer].register_forward_hook(stop)
    yield
    handle.remove()


def failed(model: Any, layer: int = 2, **options: Any) -> None:
    with stopping(model, layer), pytest.raises(StopError):
        forward(model, **options)


def held(cache: DynamicCache) -> list[Tensor | None]:
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


def same(ours: DynamicCache, expected: list[Tensor | None]) -> bool:
    pairs = zip(held(ours), expected, strict=True)
    return all((a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


@pytest.mark.parametrize("pipeline", ["framefusion", "fastv", "streaming_llm", MERGE_KV])
def test_a_first_prefill(pipeline: Any) -> None:
    """Afterwards the cache is empty: it takes the prompt again, and a dense one without a pipeline."""
    model, budget = tiny_model(), None if isinstance(pipeline, dict) else 0.8
    cache, dense = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with tr.reduce(model, pipeline, budget=budget, layout=layout()):
        failed(model, past_key_values=cache)
        assert cache.get_seq_length() == 0
        assert held(cache) == [None] * 8
        again = copy.deepcopy(cache)
        ours = forward(model, past_key_values=again)
        assert torch.equal(ours, forward(model, past_key_values=DynamicCache(config=model.config)))
    assert torch.equal(forward(model, past_key_values=cache), forward(model, past_key_values=dense))
    ids = prompt()[:, :1]
    assert torch.equal(forward(model, ids=ids, past_key_values=cache), forward(model, ids=ids, past_key_values=dense))


@pytest.mark.parametrize("pipeline", ["framefusion", "random", MERGE_KV])
@pytest.mark.parametrize("first", ["dense", "reduced"])
def test_a_later_turn(pipeline: Any, first: str) -> None:
    model, budget = tiny_model(), None if isinstance(pipeline, dict) else 0.8
    cache = DynamicCache(config=model.config)
    if first == "dense":
        forward(model, past_key_values=cache)
    with tr.reduce(model, pipeline, budget=budget, layout=layout()) as run:
        if first == "reduced":
            forward(model, past_key_values=cache)
            run.layout = layout()
        was, untouched = held(cache), copy.deepcopy(cache)
        failed(model, past_key_values=cache, ids=prompt(1))
        assert same(cache, was)
        for ids in (prompt(2), prompt()[:, :4], prompt()[:, :1]):
            outs = []
            for each in (cache, untouched):
                if ids.shape[1] == TOKENS:
                    run.layout = layout()
                outs.append(forward(model, ids=ids, past_key_values=each))
            assert torch.equal(*outs)


def test_a_text_turn_on_a_reduced_cache() -> None:
    model, cache = tiny_model(), DynamicCache()
    with tr.reduce(model, "framefusion", budget=0.8, layout=layout()):
        forward(model, past_key_values=cache)
        was = held(cache)
        failed(model, past_key_values=cache, ids=prompt()[:, :4])
        assert same(cache, was)


def test_a_padded_text_turn_on_a_cache_that_is_not_reduced() -> None:
    """The layers had been told what comes; without a pipeline they would count it to the tokens of the next turn."""
    model, cache, ids = tiny_model(), DynamicCache(), prompt(rows=2)
    text, mask = ids[:, :4], torch.ones(2, TOKENS + 4, dtype=torch.long)
    mask[1, TOKENS] = 0
    keep = {"stages": [{"strategy": "random", "at": 0, "keep": 1.0}]}
    with tr.reduce(model, keep, layout=layout()):
        forward(model, ids=ids, past_key_values=cache)
        untouched = copy.deepcopy(cache)
        failed(model, layer=-1, ids=text, attention_mask=mask, past_key_values=cache)
    for _ in range(2):
        ours = forward(model, ids=text[:, :2], past_key_values=cache)
        assert torch.equal(ours, forward(model, ids=text[:, :2], past_key_values=untouched))
    assert cache.get_seq_length() == TOKENS + 4


def test_a_cache_that_was_given_by_its_place() -> None:
    """Its layers keep no plan of a padded turn that failed: the next turn, dense or not, would take its padding for its own."""
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    ids = prompt(rows=2)
    mask = torch.cat([torch.ones_like(ids), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])], 1)
    with tr.reduce(model, {"stages": [{"strategy": "random", "at": 1, "keep": 1.0}]}, layout=layout()):
        forward(model, ids=ids, past_key_values=cache)
        with stopping(model, -1), pytest.raises(StopError):
            model.model(ids[:, :4], mask, None, cache)
    assert all(layer.plan is None for layer in cache.layers)


@pytest.mark.parametrize("detached", [False, True])
def test_a_turn_broken_off_by_ctrl_c(detached: bool) -> None:
    """torch tells no hook. The cache is as it was once the model is called again, or is detached."""
    model, cache, undisturbed = tiny_model(), DynamicCache(), DynamicCache()
    half = {"stages": [{"strategy": "random", "at": 1, "keep": 0.5}]}
    for each in (cache, undisturbed):
        forward(model, ids=prompt()[:, :5], past_key_values=each)
    with tr.reduce(model, half, layout=layout()):
        handle = model.model.layers[2].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            forward(model, past_key_values=cache)
        handle.remove()
        if not detached:
            # The positions of this call were counted from a cache that was half filled.
            with pytest.raises(UnsupportedError, match="was broken off, and only now is it as it was before"):
                forward(model, past_key_values=cache)
            assert same(cache, held(undisturbed))
            ours = forward(model, past_key_values=cache)
    if detached:
        assert same(cache, held(undisturbed))
        with tr.reduce(model, half, layout=layout()):
            ours = forward(model, past_key_values=cache)
    with tr.reduce(model, half, layout=layout()):
        assert torch.equal(ours, forward(model, past_key_values=undisturbed))


def test_what_is_refused_when_all_layers_have_run() -> None:
    """A stage that keeps more than its budget is told at the end: the turn is taken back all the same."""
    model, cache = tiny_model(), DynamicCache()
    forward(model, past_key_values=cache)
    was = held(cache)
    Double.act = staticmethod(lambda ctx: None)
    pipeline = {"stages": [{"strategy": "double", "site": "pre_attention", "at": 0}]}
    with (
        tr.reduce(model, pipeline, budget=0.8, layout=layout()),
        pytest.raises((PipelineError, BudgetError)),
    ):
        forward(model, past_key_values=cache, ids=prompt(1))
    assert same(cache, was)


def test_older_tokens_that_a_span_has_dropped() -> None:
    """They are not kept for the case of a failure: the cache is refused from then on, with a pipeline and without."""
    model, cache = tiny_model(), DynamicCache()
    with tr.reduce(model, WINDOW, layout=layout()) as run:
        forward(model, past_key_values=cache)
        run.layout = layout()
        failed(model, past_key_values=cache, ids=prompt(1))
        for ids in (prompt(), prompt()[:, :1]):
            with pytest.raises(
                UnsupportedError, match="a forward that failed has dropped earlier tokens of this KV cache"
            ):
                forward(model, ids=ids, past_key_values=cache)
    with pytest.raises(UnsupportedError, match="begin again with a new cache"):
        forward(model, ids=prompt()[:, :1], past_key_values=cache)
    cache.reset()
    assert torch.equal(forward(model, past_key_values=cache), forward(model, past_key_values=DynamicCache()))


def test_plans_are_forgotten() -> None:
    cache = DynamicCache()
    for layer in adopt(cache, 3):
        layer.plan = KvPlan(TOKENS)
    forget_plans(cache)
    assert [layer.plan for layer in cache.layers] == [None] * 3
    for other in (None, (), 5, DynamicCache()):
        forget_plans(other)
