"""Streams for tests: pipelines, a video, chunks of it, and what the prefill of the whole gives."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

import tokenreduce as tr

CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large]
SOME = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=CHECKS)
MANY = settings(max_examples=2000, deadline=None, suppress_health_check=CHECKS)
EXACT = 1e-6
MERGE = {"strategy": "similarity_merge", "threshold": 0.6, "at": 0, "stop_below": 0.0}
WINDOW = {"strategy": "streaming_window", "sinks": 2, "window": 9}
VIDEO = tr.TokenLayout.video(before=3, frames=9, per_frame=5, after=4)
TOKENS = VIDEO.shape[1]


def pipeline(*stages: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"name": "streamed", "stages": list(stages), **rest}


def layout_of(row: Any) -> tr.TokenLayout:
    """The layout of a row of `test_properties.rows`."""
    slot, frame, medium, marker, protected = (column[None] for column in torch.tensor(row).unbind(-1))
    return tr.TokenLayout(slot=slot, frame=frame, medium=medium, marker=marker, protected=protected.bool())


def part(layout: tr.TokenLayout, start: int, stop: int) -> tr.TokenLayout:
    """Some of the tokens of a layout."""
    given = {name: value[:, start:stop] for name, value in vars(layout).items() if value is not None}
    return replace(layout, **given)


@contextmanager
def states(model: Any) -> Iterator[list[Tensor]]:
    """What the decoder's last norm gives, forward by forward."""
    seen: list[Tensor] = []
    handle = model.model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    yield seen
    handle.remove()


def whole(model: Any, plan: Any, x: Tensor, layout: tr.TokenLayout) -> tuple[Tensor, Any, Any]:
    """Last hidden states, cache and trace of the prefill of the whole."""
    with torch.no_grad(), tr.reduce(model, plan, layout=layout) as run, states(model) as seen:
        out = model(inputs_embeds=x, use_cache=True)
        return torch.cat(seen, 1), out.past_key_values, run.trace


def fed(stream: tr.Stream, x: Tensor, layout: tr.TokenLayout, borders: list[int]) -> Any:
    """The output of the stream of x, cut at `borders`."""
    cuts = [0, *borders, x.shape[1]]
    for start, stop in itertools.pairwise(cuts[:-1]):
        stream.feed(x[:, start:stop], part(layout, start, stop))
    return stream.finish(x[:, cuts[-2] :], part(layout, cuts[-2], cuts[-1]))


def same_trace(one: Any, other: Any) -> None:
    assert torch.equal(one.kept[0], other.kept[0])
    assert torch.equal(one.source, other.source)
    assert one.stages == other.stages
    assert [layer.tokens.tolist() for layer in one.layers] == [layer.tokens.tolist() for layer in other.layers]
    assert (one.kv_bytes, one.dense_flops, one.relative_tokens) == (
        other.kv_bytes, other.dense_flops, other.relative_tokens,
    )  # fmt: skip


def near(ours: Tensor, theirs: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
