"""What layers really cost: where a configuration tells it, FLOPs and bytes are exact; where not, the receipt says so."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from support.tiny import assert_same, snapshot
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import tokenreduce as tr
from tokenreduce.engine.model.meter import Meter
from tokenreduce.errors import UnsupportedError
from tokenreduce.planning.cost import DecoderShape

LAYOUT = tr.TokenLayout.video(before=4, frames=6, per_frame=5, after=6)
TOTAL = LAYOUT.shape[1]
IDS = torch.randint(3, 90, (1, TOTAL), generator=torch.Generator().manual_seed(0))
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 6}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
UNLIKE: dict[str, dict[str, Any]] = {
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 24},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "diffllama": {},
    "deepseek_v2": LATENT | ROUTED | {"n_group": 1, "topk_group": 1},
    "deepseek_v3": LATENT | ROUTED | {"n_group": 1, "topk_group": 1},
    "dots1": ROUTED | {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "head_dim": 8},
}
"""Families whose layers are not alike, or not what their config says."""
LIKE: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "jais2": {},
    "nanochat": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "qwen3_moe": EXPERTS | {"head_dim": 8},
}
"""Families that FLOPs are known of; of jais2 and nanochat only by measuring."""


def model(kind: str, more: dict[str, Any], attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**TINY | more)
    subject = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype).eval()
    if dtype is torch.float64 and any("expert" in name for name, _ in subject.named_modules()):
        subject.set_experts_implementation("eager")  # Grouped products have no double precision.
    return subject


def cached(cache: Any) -> list[int]:
    return [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_token_budget_needs_no_flops(kind: str) -> None:
    subject = model(kind, UNLIKE[kind])
    with torch.no_grad(), tr.reduce(subject, "random", budget=0.5, layout=LAYOUT) as run:
        out = subject(IDS)
        trace = run.trace
    assert sum(int(layer.tokens) for layer in trace.layers) <= 0.5 * TOTAL * 3
    assert trace.flops is trace.relative_flops is trace.dense_flops is trace.selector_flops is None
    assert "FLOPs not known" in str(trace)
    assert "no FLOPs: its config" in str(trace)
    assert json.loads(json.dumps(trace.to_dict()))["flops"] is None
    assert [layer.kv_bytes for layer in trace.layers] == cached(out.past_key_values)
    left = trace.kept[0][None]
    with torch.no_grad():
        short = subject(IDS[:, left[0]], torch.ones_like(left), position_ids=left, use_cache=False).logits
    assert torch.allclose(out.logits, short, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_budget_of_flops_is_refused_by_name(kind: str) -> None:
    subject = model(kind, UNLIKE[kind])
    before = snapshot(subject)
    with pytest.raises(
        UnsupportedError, match=r"its config .*; a budget in flops cannot be solved for it, one in tokens"
    ) as e:
        tr.reduce(subject, "random", budget={"flops": 0.6}, layout=LAYOUT)
    assert type(subject).__name__ in str(e.value)
    assert "\n" not in str(e.value)
    assert_same(subject, before)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", LIKE)
def test_flops_that_are_told_are_what_torch_counts(kind: str, attention: str) -> None:
    """With experts in grouped products, too, which torch's counter does not know and ours does."""
    subject = model(kind, LIKE[kind], attention, torch.float32)
    with torch.no_grad(), tr.reduce(subject, "random", budget={"flops": 0.6}, layout=LAYOUT) as run:
        out = subject(IDS, logits_to_keep=1)
    trace = run.trace
    assert trace.relative_flops is not None
    assert trace.relative_flops <= 0.6
    assert [layer.kv_bytes for layer in trace.layers] == cached(out.past_key_values)
    if "num_experts_per_tok" in LIKE[kind]:
        subject.set_experts_implementation("eager")
    subject.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), tr.reduce(subject, "random", budget={"flops": 0.6}, layout=LAYOUT), counter:
        subject(IDS, logits_to_keep=1)
    assert abs(counter.get_total_flops() - trace.flops) <= 0.001 * trace.flops  # type: ignore[operator]


def test_uneven_caches_are_counted_and_not_solved_for() -> None:
    """Layers of MiMo-V2-Flash with a window have more heads for keys than the others; their values are narrower."""
    more = {
        "num_key_value_heads": 2,
        "head_dim": 12,
        "v_head_dim": 6,
        "n_group": 1,
        "topk_group": 1,
        "sliding_window": 129,
    }
    types = ["full_attention", "sliding_attention", "full_attention"]
    subject = model("mimo_v2_flash", ROUTED | more | {"layer_types": types}, "eager")
    with torch.no_grad(), tr.reduce(subject, "random", budget=0.5, layout=LAYOUT) as run:
        out = subject(IDS)
    held = [layer.kv_bytes for layer in run.trace.layers]
    assert held == cached(out.past_key_values)
    assert len(set(held)) > 1
    for budget in ({"kv_cache": 0.5}, {"kv_cache": 20_000}):
        with pytest.raises(UnsupportedError, match=r"cached numbers per token in a layer, its layers hold 36 or 72; "):
            tr.reduce(subject, "random", budget=budget, layout=LAYOUT)


def test_a_share_of_a_cache_is_solved_where_its_layers_are_alike() -> None:
    subject = model("deepseek_v3", UNLIKE["deepseek_v3"])
    with torch.no_grad():
        dense = sum(cached(subject(IDS).past_key_values))
        with tr.reduce(subject, "random", budget={"kv_cache": 0.5}, layout=LAYOUT) as run:
            spent = sum(cached(subject(IDS).past_key_values))
    assert run.trace.kv_bytes == spent <= 0.5 * dense
    with pytest.raises(UnsupportedError, match="a budget in kv_cache cannot be solved"):
        tr.reduce(subject, "random", budget={"kv_cache": dense}, layout=LAYOUT)


def test_what_is_no_plain_attention_stays_refused() -> None:
    with pytest.raises(UnsupportedError, match="mamba_d_state=16"):
        DecoderShape.from_config({**TINY, "hidden_act": "silu", "mamba_d_state": 16, "head_dim": 8})
    mixed = {**TINY, "hidden_act": "silu", "layer_types": ["linear_attention"] * 3, "head_dim": 8}
    with pytest.raises(UnsupportedError, match="linear_attention"):
        DecoderShape.from_config(mixed)
    assert "linear_attention" in DecoderShape.candidates(mixed)[1]  # It can be attached, and measured.
    shapes, why = DecoderShape.candidates({**TINY, "hidden_act": "relu2", "head_dim": 8})
    assert [shape.gated for shape in shapes] == [True, False]
    assert "gated" in why


@pytest.mark.parametrize("inference", [False, True])
def test_the_meter_counts_as_torch_does(inference: bool) -> None:
    subject = model("qwen2", {}, "eager")
    with torch.inference_mode(inference), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            subject(IDS)
        with Meter() as meter:
            subject(IDS)
    assert meter.flops == counter.get_total_flops()


def test_attached_in_inference_mode_it_measures_the_same() -> None:
    subject = model("jais2", {})
    with torch.inference_mode(), tr.reduce(subject, "random", budget={"flops": 0.6}, layout=LAYOUT) as run:
        subject(IDS)
    assert run.trace.flops is not None


def test_a_quantized_model_is_believed() -> None:
    """Products in packed numbers are in no registry."""
    subject = model("qwen2", {})
    for layer in subject.model.layers:
        weight = layer.mlp.down_proj.weight
        layer.mlp.down_proj.forward = lambda x, weight=weight: (x[..., None, :] * weight).sum(-1)
    subject.config.quantization_config = {"quant_method": "its own"}
    with torch.no_grad(), tr.reduce(subject, "random", budget={"flops": 0.6}, layout=LAYOUT) as run:
        subject(IDS)
    assert run.trace.flops is not None
    del subject.config.quantization_config
    with pytest.raises(UnsupportedError, match="a budget in flops cannot be solved"):
        tr.reduce(subject, "random", budget={"flops": 0.6}, layout=LAYOUT)
