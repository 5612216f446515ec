"""A user's own KV cache: refused by name, or adopted; and as it was before, once a forward has failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tokenreduce.engine.cache.layers import TokenLayer
from tokenreduce.engine.cache.states import EmptyLayer, StateLayer, link, stand_in
from tokenreduce.errors import UnsupportedError

INSTEAD = (
    "leave out past_key_values and cache_implementation, or pass past_key_values=DynamicCache(config=model.config)"
)
"""What to use where a cache is refused."""


def refuse_cache(cache: Any) -> None:
    """UnsupportedError, naming the cache, where it is not a plain DynamicCache."""
    name = type(cache).__name__
    if not isinstance(cache, DynamicCache):
        more = {
            "StaticCache": "; a model is faster compiled with a DynamicCache too: model.compile(), see docs/compile.md",
            "QuantizedCache": "; to make the cache smaller, give the pipeline a smaller budget, such as {kv_cache: 512MiB}",
        }.get(name, "")
        raise UnsupportedError(f"{name} is not supported: token reduction needs a DynamicCache; {INSTEAD}{more}")
    if cache.offloading:
        raise UnsupportedError(
            "an offloaded KV cache is not supported: token reduction needs a plain DynamicCache; "
            f"{INSTEAD}; to make the cache smaller, give the pipeline a smaller budget, such as {{kv_cache: 512MiB}}"
        )
    for method in ("update", "get_seq_length", "get_mask_sizes"):
        if getattr(getattr(cache, method), "__func__", None) is not getattr(DynamicCache, method):
            raise UnsupportedError(
                f"{name} with a method `{method}` of its own is not supported: token reduction needs a plain DynamicCache"
            )


def seen_tokens(cache: Any) -> int:
    """Tokens that a cache has seen, as transformers counts. UnsupportedError where it is no cache at all."""
    if not hasattr(cache, "get_seq_length"):
        refuse_cache(cache)
    return int(cache.get_seq_length())


def forget_plans(cache: Any) -> None:
    """Drop what a forward that failed has planned for `cache`, whatever it is: the next one has plans of its own."""
    for layer in token_layers(cache):
        layer.plan = None


def adopt(cache: Any, depth: int, valid: Tensor | None = None) -> list[TokenLayer]:
    """Swap the layers of `cache` for TokenLayers, in place, so that a user's own cache object goes on working.

    valid: (B, held) bool, False where the tokens of earlier turns are padding.

    Raises UnsupportedError, naming the cache, where it is not a plain DynamicCache.
    """
    refuse_cache(cache)
    layers: list[Any] = []
    for place in range(depth):
        old = cache.layers[place] if place < len(cache.layers) else None
        if isinstance(old, TokenLayer):
            layers.append(old)
            continue
        other = stand_in(place, old)
        if other is not None:
            layers.append(other)
            continue
        if old is not None and type(old) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UnsupportedError(
                f"a cache with a {type(old).__name__} is not supported: token reduction needs a plain DynamicCache"
            )
        layer = TokenLayer(place)
        if old is not None and old.is_initialized and old.get_seq_length():
            if old.get_seq_length() != old.keys.shape[-2]:
                raise UnsupportedError("a sliding-window cache that has already dropped tokens is not supported")
            layer.lazy_initialization(old.keys, old.values)
            layer.keys, layer.values = old.keys, old.values
            layer.not_padding, layer.regular = valid, valid is None
        layers.append(layer)
    link(layers)
    cache.layers[:] = layers
    return layers


def token_layers(cache: Any) -> list[TokenLayer]:
    """The layers of a cache that the engine has adopted; empty for any other."""
    layers = cache.layers if isinstance(cache, Cache) else []
    return layers if layers and isinstance(layers[0], (TokenLayer, StateLayer, EmptyLayer)) else []


class Before:
    """What the layers of a cache were before a forward: keys and values by their number alone, which holds no memory."""

    def __init__(self, layers: Sequence[TokenLayer]) -> None:
        self.layers: list[tuple[TokenLayer, int, dict[str, Any]]] = []
        self.others: list[tuple[Any, dict[str, Any]]] = []
        for layer in layers:
            if not isinstance(layer, TokenLayer):
                self.others.append((layer, layer.snapshot()))
                continue
            layer.shed = False
            rest = {
                name: value for name, value in vars(layer).items() if name not in ("keys", "values", "plan", "seen")
            }
            self.layers.append((layer, layer.held, rest))

    def restore(self) -> bool:
        """Drop what has come since; whether that was anything.

        Where a span has dropped older tokens, they are lost, and the cache is broken."""
        changed = any(layer.logical != held + rest["gone"] for layer, held, rest in self.layers)
        changed |= any(layer.changed for layer, _ in self.others)
        for layer, snapshot in self.others:
            layer.restore(snapshot)
        broken = any(layer.shed and held for layer, held, _ in self.layers)
        for layer, held, rest in self.layers:
            if not held:
                layer.reset()
            elif layer.held > held:
                # Copied, so that the longer tensor goes.
                layer.keys, layer.values = layer.keys[:, :, :held].clone(), layer.values[:, :, :held].clone()
            layer.__dict__.update(rest, plan=None, seen=None)
            layer.is_initialized = layer.is_initialized and bool(held)
            layer.broken |= broken
            layer.reduced |= broken
        return changed
