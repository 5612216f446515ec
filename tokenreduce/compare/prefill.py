"""One prefill: timing the decoder, and reading off what was done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.compare.clock import now
from tokenreduce.engine.run import Run
from tokenreduce.errors import UnsupportedError
from tokenreduce.planning.cost import DecoderShape, layer_flops, prefill_flops


@dataclass(frozen=True)
class PrefillCounts:
    """What a prefill of batch 1 did. Every repetition gives the same counts."""

    tokens: list[int]
    """Tokens in the KV cache, per layer."""
    layer_flops: list[int]
    """FLOPs of the decoder, per layer."""
    flops: int
    """FLOPs of the decoder, of the strategies, and of the LM head at one position."""
    dense_flops: int
    """FLOPs where nothing is reduced, with the LM head at one position."""
    selector_flops: int
    """FLOPs of the strategies."""
    kv_bytes: int
    """Bytes of the cache's tensors."""
    source: Tensor
    """(N,) long on the CPU: the column whose token stands for each input token when decoding begins, −1 if none does."""
    spared: bool
    """Whether a stage in the vision tower left something out."""


def count_prefill(run: Run | None, shape: DecoderShape, output: Any, width: int) -> PrefillCounts:
    """Counts of the prefill that gave `output`: from the trace of `run`; of a dense prefill (None, or no stages) from its cache.

    shape: of the decoder. width: N, tokens of the input. Raises UnsupportedError where the trace cannot count FLOPs.
    """
    layers = output.past_key_values.layers
    kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    dense_flops = prefill_flops(shape, [width] * shape.layers, [width] * shape.layers)
    source = torch.arange(width)
    if run is None or not run.pipeline.stages:
        return PrefillCounts(
            tokens=[int(layer.keys.shape[-2]) for layer in layers],
            layer_flops=[layer_flops(shape, width, width)] * shape.layers,
            flops=dense_flops,
            dense_flops=dense_flops,
            selector_flops=0,
            kv_bytes=kv_bytes,
            source=source,
            spared=False,
        )
    trace = run.trace
    if trace.flops is None or trace.selector_flops is None:
        raise UnsupportedError(trace.uncounted)
    seen = getattr(layers[-1], "position", None)
    # Hidden states all stay at `kv` sites; what decoding can see is what the last cache holds.
    source = trace.source[0].cpu() if seen is None else source.where(torch.isin(source, seen[0].cpu()), -1)
    return PrefillCounts(
        tokens=[int(layer.tokens[0]) for layer in trace.layers],
        layer_flops=[layer.flops or 0 for layer in trace.layers],
        flops=trace.flops,
        dense_flops=dense_flops,
        selector_flops=trace.selector_flops,
        kv_bytes=kv_bytes,
        source=source,
        spared=any(stage.site.startswith("vision.") and stage.after < stage.before for stage in trace.stages),
    )


def is_finite(logits: Tensor) -> bool:
    """Whether logits are numbers to choose by. Models may forbid a token with −∞, but not all of them."""
    return bool((logits < torch.inf).all()) and bool((logits > -torch.inf).any(-1).all())


@contextmanager
def timed(decoder: nn.Module, device: torch.device) -> Iterator[list[float]]:
    """Seconds of each forward of `decoder`, in order, as they end."""
    starts: list[float] = []
    spans: list[float] = []
    handles = [
        decoder.register_forward_pre_hook(lambda *_: starts.append(now(device))),
        decoder.register_forward_hook(lambda *_: spans.append(now(device) - starts[-1])),
    ]
    try:
        yield spans
    finally:
        for handle in handles:
            handle.remove()
