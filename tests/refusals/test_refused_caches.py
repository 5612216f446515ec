"""Key-value caches that are refused by name, and those that tokenreduce itself has reduced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.tiny import (
    TOKENS,
    forward,
    generate,
    layout,
    logits,
    prompt,
    refused,
    tiny_model,
)
from transformers import DynamicCache, QuantizedCache, StaticCache

import tokenreduce as tr
from tokenreduce.errors import (
    LayoutError,
    UnsupportedError,
)


class Evicting(DynamicCache):
    """Holds the last tokens only."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        out = super().update(*args, **kwargs)
        layer = self.layers[args[2]]
        layer.keys, layer.values = layer.keys[:, :, -10:], layer.values[:, :, -10:]
        return out


class Counting(DynamicCache):
    """Says that it has seen fewer tokens."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def patched(config: Any) -> DynamicCache:
    cache = DynamicCache(config=config)
    cache.update = partial(Evicting.update, cache)
    return cache


@pytest.mark.parametrize(
    ("cache", "match"),
    [
        (
            lambda config: StaticCache(config, max_cache_len=64),
            "StaticCache is not supported: .* needs a DynamicCache; leave out .*compile.md",
        ),
        (
            lambda config: DynamicCache(config=config, offloading=True),
            "an offloaded KV cache is not supported.*kv_cache: 512MiB",
        ),
        (lambda config: QuantizedCache("fp8", config), "QuantizedCache is not supported.*kv_cache: 512MiB"),
        (lambda config: Evicting(config=config), "Evicting with a method `update` of its own is not supported"),
        (lambda config: patched(config), "DynamicCache with a method `update` of its own is not supported"),
        (lambda config: Counting(config=config), "Counting with a method `get_seq_length` of its own is not supported"),
        (lambda config: ((torch.zeros(1, 2, 3, 8),) * 2,) * 4, "tuple is not supported: .* needs a DynamicCache"),
        (lambda config: (), "tuple is not supported"),
        (lambda config: 5, "int is not supported"),
    ],
)
def test_caches(cache: Callable[[Any], Any], match: str) -> None:
    refused(tiny_model(), lambda model: forward(model, past_key_values=cache(model.config)), match)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cache_implementation": "static"}, "StaticCache is not supported"),
        ({"cache_implementation": "offloaded"}, "an offloaded KV cache is not supported"),
        ({"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}, "QuantizedCache is not supported"),
        (
            {"prefill_chunk_size": 8},
            "the layout given is for 32 tokens, the forward has 8; chunked prefill is not supported .use tr.stream",
        ),
    ],
)
def test_generate_options(options: dict[str, Any], match: str) -> None:
    error = LayoutError if "prefill_chunk_size" in options else UnsupportedError
    model = tiny_model()
    if options.get("cache_implementation") == "static":
        generate(model, **options)  # transformers leaves its compiled call on the model.
    refused(model, lambda model: generate(model, **options), match, error)


def test_a_layer_of_another_kind_in_a_dynamic_cache() -> None:
    def call(model: Any) -> None:
        cache = DynamicCache(config=model.config)
        cache.layers[0] = QuantizedCache("fp8", model.config).layers[0]
        forward(model, past_key_values=cache)

    refused(tiny_model(), call, "a cache with a Fp8QuantizedLayer is not supported")


def test_a_sliding_window() -> None:
    """Supported up to the window's length, where it is full attention; refused beyond."""
    sliding = {"use_sliding_window": True, "max_window_layers": 0, "layer_types": ["sliding_attention"] * 4}
    fits = tiny_model(sliding_window=TOKENS + 3, **sliding)
    full = tiny_model()
    with tr.reduce(full, "framefusion", budget=0.6, layout=layout()):
        expected = generate(full)
    with tr.reduce(fits, "framefusion", budget=0.6, layout=layout()):
        ours = generate(fits)
        assert torch.equal(ours.sequences, expected.sequences)
        assert torch.equal(torch.stack(ours.logits), torch.stack(expected.logits))
        with pytest.raises(
            UnsupportedError, match=f"{TOKENS + 4} tokens are beyond its sliding window of {TOKENS + 3}"
        ):
            generate(fits, tokens=8)
    short = tiny_model(sliding_window=TOKENS - 1, **sliding)
    dense = logits(short)
    with (
        pytest.raises(UnsupportedError, match=f"{TOKENS} tokens are beyond its sliding window of {TOKENS - 1}"),
        tr.reduce(short, "framefusion", budget=0.6, layout=layout()),
    ):
        generate(short)
    assert torch.equal(logits(short), dense)


@pytest.mark.parametrize("preset", ["framefusion", "streaming_llm", "noncascaded_merge"])
def test_a_reduced_cache_after_detach(preset: str) -> None:
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    with tr.reduce(model, preset, budget=0.6, layout=layout()):
        forward(model, past_key_values=cache)
        expected = forward(model, ids=prompt()[:, :1], past_key_values=(copied := copy.deepcopy(cache)))
    length = cache.get_seq_length()
    with pytest.raises(UnsupportedError, match="this KV cache was reduced by tokenreduce, and no pipeline is attached"):
        forward(model, ids=prompt()[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == length
    assert copied.get_seq_length() == length + 1
    with tr.reduce(model, preset, budget=0.6, layout=layout()):  # Attached again, it goes on where it was.
        assert torch.equal(forward(model, ids=prompt()[:, :1], past_key_values=cache), expected)


def test_a_cache_of_which_only_the_shorter_rows_were_reduced() -> None:
    """It holds as many columns as before, and yet other tokens: it is reduced all the same."""
    model = tiny_model()
    slot = torch.cat([torch.full((1, TOKENS), -1), layout().slot])
    frame = torch.cat([torch.full((1, TOKENS), -1), layout().frame])
    cache, ids = DynamicCache(config=model.config), prompt(rows=2)
    with tr.reduce(model, "random", budget=0.6, layout=tr.TokenLayout(slot=slot, frame=frame)):
        forward(model, ids=ids, past_key_values=cache)
        step = forward(model, ids=ids[:, :1], past_key_values=copy.deepcopy(cache))
    with tr.reduce(model, "random", budget=0.6, layout=layout()):
        alone = DynamicCache(config=model.config)
        forward(model, ids=ids[1:], past_key_values=alone)
        torch.testing.assert_close(step[1:], forward(model, ids=ids[1:, :1], past_key_values=alone), atol=1e-5, rtol=0)
    with pytest.raises(UnsupportedError, match="this KV cache was reduced by tokenreduce"):
        forward(model, ids=ids[:, :1], past_key_values=cache)


def test_a_reduced_cache_of_a_detached_model_within_the_forward_of_another() -> None:
    model, other, cache = tiny_model(), tiny_model(seed=1), DynamicCache()
    ids, outs = prompt()[:, :1], []

    def go_on(*_: Any) -> None:
        outs.append(forward(model, ids=ids, past_key_values=cache))

    with tr.reduce(model, "random", budget=0.6, layout=layout()):
        forward(model, past_key_values=cache)
        expected = forward(model, ids=ids, past_key_values=copy.deepcopy(cache))
    length = cache.get_seq_length()
    with tr.reduce(other, "random", budget=0.6, layout=layout()):
        handle = other.model.layers[1].register_forward_hook(go_on)
        with pytest.raises(
            UnsupportedError, match="this KV cache was reduced by tokenreduce, and no pipeline is attached"
        ):
            forward(other)
        assert cache.get_seq_length() == length
        with tr.reduce(model, "random", budget=0.6, layout=layout()):  # With a pipeline of its own it goes on.
            forward(other)
        handle.remove()
    assert torch.equal(outs[0], expected)
