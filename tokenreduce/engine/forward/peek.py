"""A layer's own attention before the layer: for stages at `pre_attention` that declare `own_attention`.

The layer's forward runs once up to its attention, without its KV cache, and is broken off there by an exception that carries
queries and keys. No model code is copied. Its hooks do not run, and no gradient flows through it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.engine.cache.layers import TokenLayer
from tokenreduce.engine.forward.batch import Batch
from tokenreduce.engine.forward.importance import AttentionRecord
from tokenreduce.engine.forward.sequence import TokenSequence
from tokenreduce.errors import UnsupportedError


class Peeked(BaseException):
    """What a layer was about to attend with."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.query, self.key, self.value, self.kwargs = query, key, value, kwargs


def peek(
    layer: int, module: nn.Module, batch: Batch, cache: TokenLayer | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AttentionRecord:
    """The attention that `module`, decoder layer `layer`, is about to compute with these arguments.

    UnsupportedError where the layer ends without any: its attention is not where the others have theirs.
    """
    kwargs = {**kwargs, "attention_mask": None}
    for name in ("past_key_values", "past_key_value", "layer_past"):
        if name in kwargs:
            kwargs[name] = None
    if kwargs.get("use_cache") is not None:
        kwargs["use_cache"] = False
    tables = kwargs.get("position_embeddings")
    if tables is not None:
        kwargs["position_embeddings"] = batch.rotate(tables)
    try:
        with torch.no_grad():
            module.forward(*args, **kwargs)
    except Peeked as seen:
        return _record(layer, seen, batch, cache)
    raise UnsupportedError(f"layer {layer} computes no attention before which a stage could look at it")


def _record(layer: int, seen: Peeked, batch: Batch, cache: TokenLayer | None) -> AttentionRecord:
    """Keys of earlier turns first, as the layer will have them."""
    key, value = seen.key, seen.value
    rows, new = key.shape[0], key.shape[2]
    valid = batch.valid if batch.valid is not None else torch.ones(rows, new, dtype=torch.bool, device=key.device)
    if cache is not None and cache.held:
        before = cache.valid
        earlier = valid.new_ones(rows, cache.held) if before is None else before
        key, value = torch.cat([cache.keys, key], 2), torch.cat([cache.values, value], 2)
        valid = torch.cat([earlier.to(valid.device), valid], 1)
    record = AttentionRecord.of(layer, seen.query, key, seen.kwargs, value)
    record.held = valid.to(key.device)
    record.attended = {sequence.row: sequence.alive for sequence in batch.sequences}
    return record


def due(sequences: list[TokenSequence], layer: int) -> bool:
    """Whether a stage of one of them may look at the attention of `layer` before it."""
    return any(
        run.strategy.capabilities.own_attention
        and not run.done
        and any(site.layer == layer and site.kind == "pre_attention" and run.strategy.reads(site) for site in run.sites)
        for sequence in sequences
        for run in sequence.runs
    )
