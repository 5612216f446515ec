"""FLOPs and bytes of the trace against torch's own counter and the cache's own tensors, on real prefills."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.decoders import account, decoder, embeddings, tokens_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import tokenreduce as tr
from tokenreduce.pipeline import build, load_pipeline
from tokenreduce.planning.cost import prefill_flops
from tokenreduce.planning.schedule import forecast

HIDDEN, DEPTH = 128, 4
LAYOUT = tr.TokenLayout.video(before=20, frames=10, per_frame=45, after=30)
TOTAL, VISION = LAYOUT.shape[1], 450
NAMES = [
    "framefusion",
    "framefusion_official",
    "framefusion_equal",
    "fastv",
    "random",
    "merge_only",
    "streaming_llm",
    "noncascaded_merge",
    "prune_only",
    "uniform_frames",
]


def budget_of(name: str, share: float) -> Any:
    official = name == "framefusion_official"
    return {"tokens": share, **({"of": "vision", "arithmetic": "released"} if official else {})}


def measured(
    name: Any, budget: Any, family: str = "qwen2", implementation: str = "eager", head: int = 1, layout: Any = LAYOUT
) -> tuple[tr.Trace, int, DynamicCache]:
    model = decoder(DEPTH, HIDDEN, family, implementation, torch.float32)
    x = embeddings(layout, HIDDEN, "mixed", dtype=torch.float32)
    cache = DynamicCache(config=model.config)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), tr.reduce(model, name, layout=layout, budget=budget) as run, counter:
        model(inputs_embeds=x, past_key_values=cache, logits_to_keep=head)
    return run.trace, counter.get_total_flops(), cache


def within(trace: tr.Trace, counted: int, share: float = 0.01) -> bool:
    return abs(trace.flops - counted) <= share * counted


@pytest.mark.parametrize("head", [0, 1], ids=["all positions", "last position"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_dense_prefill_is_what_the_relative_numbers_divide_by(family: str, head: int) -> None:
    model = decoder(DEPTH, HIDDEN, family, "eager", torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs_embeds=embeddings(LAYOUT, HIDDEN, "mixed", dtype=torch.float32), logits_to_keep=head)
    trace, _, _ = measured("random", 1.0, family, head=head)
    assert within(trace, counter.get_total_flops())
    assert trace.relative_flops == 1
    assert trace.dense_flops == sum(layer.flops for layer in trace.layers)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("share", [0.6, 0.85])
@pytest.mark.parametrize("name", NAMES)
def test_flops_of_a_reduced_prefill_are_what_torch_counts(name: str, share: float, family: str) -> None:
    trace, counted, _ = measured(name, budget_of(name, share), family)
    assert within(trace, counted)
    assert trace.flops < trace.dense_flops


@pytest.mark.parametrize("name", ["framefusion", "fastv", "streaming_llm"])
def test_the_lm_head_is_counted_on_the_positions_it_computed(name: str) -> None:
    trace, counted, _ = measured(name, 0.6, head=0)
    assert within(trace, counted)
    assert trace.head_tokens == (TOTAL if name == "streaming_llm" else len(trace.kept[0]))


def test_importance_is_counted_apart() -> None:
    """Cumulative importance on one layer: the product of all its queries with the keys they see."""
    trace, counted, _ = measured("prune_only", 0.6)
    assert TOTAL**2 * HIDDEN < trace.selector_flops <= 2 * TOTAL**2 * HIDDEN
    assert within(trace, counted)
    assert not within(trace, counted + trace.selector_flops)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_kv_bytes_are_those_of_the_tensors_in_the_cache(name: str, implementation: str) -> None:
    trace, _, cache = measured(name, budget_of(name, 0.6), implementation=implementation)
    held = [layer.keys.numel() * layer.keys.element_size() * 2 for layer in cache.layers]
    assert [layer.kv_bytes for layer in trace.layers] == held
    assert trace.kv_bytes == sum(held)
    assert [layer.keys.shape[-2] for layer in cache.layers] == tokens_of(trace)[0]


@pytest.mark.parametrize("name", ["framefusion", "fastv", "random", "merge_only"])
@pytest.mark.parametrize("share", [0.7, 0.9])
def test_a_budget_of_flops_is_met_by_torchs_count(name: str, share: float) -> None:
    """Not above it but for what torch counts beside the layers, and less than one token per layer below."""
    trace, counted, _ = measured(name, {"flops": share})
    dense = prefill_flops(account(None, 1, 1, DEPTH, HIDDEN).shape, [TOTAL] * DEPTH, [TOTAL] * DEPTH)
    assert trace.flops <= share * dense
    assert counted <= share * dense * 1.001
    token = dense / TOTAL * 1.5  # Above the average: the attention's share of a token grows with their number.
    assert trace.flops > share * dense - token


@pytest.mark.parametrize("name", ["streaming_llm", "noncascaded_merge"])
def test_stages_at_the_cache_meet_a_budget_of_flops(name: str) -> None:
    trace, counted, _ = measured(name, {"flops": 0.9})
    dense = prefill_flops(account(None, 1, 1, DEPTH, HIDDEN).shape, [TOTAL] * DEPTH, [TOTAL] * DEPTH)
    assert counted <= 0.9 * dense * 1.001
    spent = account({"flops": 0.9}, TOTAL, VISION, DEPTH, HIDDEN)
    forecast(build(load_pipeline(name)), spent)
    assert tokens_of(trace) == [spent.kv]


def test_a_batch_is_counted_without_its_padding() -> None:
    short = tr.TokenLayout.video(before=150, frames=4, per_frame=45, after=170)
    layout = tr.TokenLayout(slot=torch.cat([short.slot, LAYOUT.slot]), frame=torch.cat([short.frame, LAYOUT.frame]))
    mask = torch.ones(2, TOTAL, dtype=torch.long)
    mask[0, :140] = 0
    model = decoder(DEPTH, HIDDEN, "qwen2", "eager", torch.float32)
    x = embeddings(layout, HIDDEN, "mixed", dtype=torch.float32)
    with torch.no_grad(), tr.reduce(model, "fastv", layout=layout, budget=0.9) as run:
        model(inputs_embeds=x, attention_mask=mask, logits_to_keep=1)
    trace, shape = run.trace, account(None, 1, 1, DEPTH, HIDDEN).shape
    rows = tokens_of(trace)
    assert [row[0] for row in rows] == [TOTAL - 140, TOTAL]
    ffn = [list(column) for column in zip(*(layer.ffn_tokens.tolist() for layer in trace.layers), strict=True)]
    expected = sum(prefill_flops(shape, row, wide) for row, wide in zip(rows, ffn, strict=True))
    assert trace.flops == expected + trace.selector_flops
    assert trace.dense_flops == sum(prefill_flops(shape, [n] * DEPTH, [n] * DEPTH, 0) for n in (TOTAL - 140, TOTAL))
