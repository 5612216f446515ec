"""FLOPs and bytes against torch's counter, against numbers worked out by hand, and against the paper's tables."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlavaConfig, Qwen2Config

from tokenreduce import plugins
from tokenreduce.errors import BudgetError, UnsupportedError
from tokenreduce.planning import cost
from tokenreduce.planning.architectures import DTYPE_BYTES, Architecture, architecture, architectures
from tokenreduce.planning.cost import DecoderShape, prefill_flops
from tokenreduce.planning.plan import plan

TINY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 32},
    "phi3": {},
    "gemma2": {"head_dim": 32},
    "starcoder2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}
SHAPE = DecoderShape(layers=2, hidden=8, ffn=20, heads=4, kv_heads=2, head_dim=2, vocab=50)
QWEN2_7B = architecture("llava-video-7b").shape


def tiny(family: str, implementation: str = "eager", **changes: Any) -> Any:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**TINY | FAMILIES[family] | changes)
    options = {"attn_implementation": implementation}
    if "num_experts_per_tok" in FAMILIES[family]:
        options["experts_implementation"] = "eager"  # torch's counter does not know grouped products
    return AutoModelForCausalLM.from_config(config, **options).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("keep", "head_tokens"), [(0, 50), (1, 1)])
def test_exact_form_is_what_torch_counts(family: str, keep: int, head_tokens: int) -> None:
    model = tiny(family)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(3, 300, (1, 50)), logits_to_keep=keep)
    counted = counter.get_total_flops()
    forecast = prefill_flops(DecoderShape.from_config(model.config), [50] * 3, [50] * 3, head_tokens)
    assert abs(forecast - counted) <= 0.001 * counted


def test_exact_form_counts_a_second_turn() -> None:
    model = tiny("qwen2")
    with torch.no_grad():
        past = model(torch.randint(3, 300, (1, 40))).past_key_values
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(3, 300, (1, 7)), past_key_values=past, logits_to_keep=1)
    forecast = prefill_flops(DecoderShape.from_config(model.config), [7] * 3, [7] * 3, kv=[47] * 3)
    assert abs(forecast - counter.get_total_flops()) <= 0.001 * forecast


def test_batch_costs_rows_times_one_sequence() -> None:
    model = tiny("qwen2")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(3, 300, (4, 20)))
    one = prefill_flops(DecoderShape.from_config(model.config), [20] * 3, [20] * 3, head_tokens=20)
    assert abs(4 * one - counter.get_total_flops()) <= 0.001 * 4 * one


def test_hand_numbers_of_one_layer() -> None:
    # 10 tokens in the attention, 6 in the FFN. Projections: 8 wide to 8 (q), 4 (k), 4 (v), and 8 (o) back to 8.
    projections = 2 * 10 * 8 * (8 + 4 + 4 + 8)
    attention = 2 * 2 * 4 * 2 * 100  # scores and values, 4 heads of width 2, 100 pairs
    ffn = 2 * 6 * 8 * 20 * 3
    assert cost.layer_flops(SHAPE, 10, 6) == projections + attention + ffn == 3840 + 3200 + 5760
    assert cost.layer_flops(SHAPE, 10, 6, form="causal") == projections + attention * 55 // 100 + ffn
    assert cost.layer_flops(SHAPE, 10, 6, pairs=7) == projections + 4 * 4 * 2 * 7 + ffn
    assert cost.head_flops(SHAPE, 3) == 2 * 3 * 8 * 50


def test_equation_5_and_6_by_hand() -> None:
    # 4 N D² + 2 N² D + 3 N' D M with N = 10, N' = 6, D = 8, M = 20
    assert cost.layer_flops(SHAPE, 10, 6, form="paper") == 2560 + 1600 + 2880
    assert prefill_flops(SHAPE, [10, 6], [6, 6], form="paper") == 7040 + (1536 + 576 + 2880)
    assert cost.head_flops(SHAPE, 10, form="paper") == 0
    assert cost.similarity_flops(SHAPE, 10) == 240


def test_paper_form_is_half_the_exact_one_without_grouped_queries() -> None:
    full = DecoderShape(layers=2, hidden=8, ffn=20, heads=4, kv_heads=4, head_dim=2, vocab=50)
    assert 2 * cost.layer_flops(full, 10, 6, form="paper") == cost.layer_flops(full, 10, 6)


@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (5, 5), (3, 9), (1, 40), (0, 4)])
def test_causal_pairs_match_counting_them(tokens: int, keys: int) -> None:
    counted = sum(key <= keys - tokens + query for query in range(tokens) for key in range(keys))
    assert cost.attention_pairs(tokens, keys, "causal") == counted
    assert cost.attention_pairs(tokens, keys) == tokens * keys


@pytest.mark.parametrize("sinks", [0, 1, 8])
@pytest.mark.parametrize("window", [1, 3, 50])
@pytest.mark.parametrize("tokens", [0, 1, 4, 11, 30])
def test_span_pairs_match_counting_them(tokens: int, sinks: int, window: int) -> None:
    seen = [(q, k) for q in range(tokens) for k in range(q + 1) if k < sinks or k > q - window]
    assert cost.span_pairs(tokens, sinks, window) == len(seen)


def test_kv_bytes_count_grouped_heads() -> None:
    assert cost.kv_bytes(SHAPE, [10, 6], 2) == 2 * 2 * 2 * 16 * 2
    # A Qwen2-7B token: 28 layers, keys and values of 4 heads of 128, 2 bytes each.
    assert cost.kv_bytes(QWEN2_7B, [1] * 28, 2) == 57344


def test_kv_bytes_are_what_a_cache_holds() -> None:
    model = tiny("qwen3")
    with torch.no_grad():
        cache = model(torch.randint(3, 300, (1, 30))).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cost.kv_bytes(DecoderShape.from_config(model.config), [30] * 3, 4) == held


@pytest.mark.parametrize(("frames", "percent"), [(8, 95.6), (16, 91.9), (32, 86.0), (64, 77.3)])
def test_table_4_with_equal_tokens_in_every_layer(frames: int, percent: float) -> None:
    # Non-cascaded merging saves at most the attention matrix. Which share of the tokens in every layer costs as much?
    n = architecture("llava-video-7b").tokens(frames)
    saved = sum(cost.layer_flops(QWEN2_7B, n, n, pairs=0, form="paper") for _ in range(28))
    fitting = max(k for k in range(n + 1) if 28 * cost.layer_flops(QWEN2_7B, k, k, form="paper") <= saved)
    assert round(100 * fitting / n, 1) == percent


def test_lists_of_another_length_and_unknown_forms_are_refused() -> None:
    with pytest.raises(BudgetError, match="ffn has 1 numbers, the decoder has 2 layers"):
        prefill_flops(SHAPE, [10, 10], [10])
    with pytest.raises(BudgetError, match="did you mean 'paper'"):
        cost.layer_flops(SHAPE, 10, 10, form="papers")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"layers": 0}, "layers"), ({"ffn": 1.5}, "ffn"), ({"kv_heads": 3}, "cannot share 3"), ({"vocab": None}, "vocab")],
)
def test_shapes_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    facts = {"layers": 2, "hidden": 8, "ffn": 20, "heads": 4, "kv_heads": 2, "head_dim": 2, "vocab": 50}
    with pytest.raises(UnsupportedError, match=message):
        DecoderShape(**facts | change)


def test_composite_dict_and_path_give_the_shape_of_the_decoder(tmp_path: Any) -> None:
    text = Qwen2Config(**TINY)
    expected = DecoderShape(layers=3, hidden=64, ffn=160, heads=4, kv_heads=2, head_dim=16, vocab=300)
    composite = LlavaConfig(text_config=text)
    assert DecoderShape.from_config(text) == DecoderShape.from_config(composite) == expected
    flat = {**TINY, "model_type": "llava_qwen", "hidden_act": "silu", "vision_config": {"hidden_size": 9}}
    assert DecoderShape.from_config(flat) == expected
    (tmp_path / "config.json").write_text(json.dumps(flat))
    assert DecoderShape.from_config(tmp_path) == DecoderShape.from_config(str(tmp_path / "config.json")) == expected


def test_a_dict_is_completed_by_the_defaults_of_its_family() -> None:
    # Qwen3 has heads of 128 unless told otherwise, whatever hidden / heads may be.
    facts = {**TINY, "model_type": "qwen3"}
    assert DecoderShape.from_config(facts).head_dim == 128
    assert DecoderShape.from_config({"text_config": {"model_type": "llama"}}) == DecoderShape(
        layers=32, hidden=4096, ffn=11008, heads=32, kv_heads=32, head_dim=128, vocab=32000
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**TINY, "hidden_act": "silu", "num_hidden_layers": None}, "num_hidden_layers=None"),
        ({**TINY, "hidden_act": "silu", "intermediate_size": [1, 2]}, "intermediate_size="),
        ({**TINY, "hidden_act": "gelu"}, "gated"),
        ({**TINY, "model_type": "qwen2", "hidden_size": "wide"}, "hidden_size"),
        ({**TINY, "hidden_act": "silu", "kv_lora_rank": 512}, "kv_lora_rank=512"),
        ({**TINY, "hidden_act": "silu", "layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({**TINY, "hidden_act": "silu", "decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        (CONFIG_MAPPING["qwen2_moe"](), "shared_expert_intermediate_size"),
        (3, "int"),
        ("no/such/config.json", r"no/such/config.json: cannot be read \(No such file"),
    ],
)
def test_configs_without_a_known_cost_are_refused_in_one_line(config: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        DecoderShape.from_config(config)
    assert "\n" not in str(caught.value)


def test_a_config_that_is_no_json_is_refused(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(UnsupportedError, match=r"config\.json: not valid JSON"):
        DecoderShape.from_config(tmp_path)


@pytest.mark.parametrize("name", architectures())
def test_known_architectures_are_complete(name: str) -> None:
    known = architecture(name.upper())
    assert known.name == name
    assert known.dtype_bytes == DTYPE_BYTES[known.dtype]
    assert known.tokens(8) == known.text_tokens + known.steps(8) * known.tokens_per_frame
    assert known.checkpoint
    # Weights of the decoder and both embeddings, in billions, against the size in the name (8B in all for MiniCPM-V, 2.2B with
    # the tower for SmolVLM2).
    shape = known.shape
    per_layer = cost.layer_flops(shape, 1, 1, pairs=0) // 2
    tower = known.vision_parameters if name.startswith("smolvlm") else 0
    billions = (shape.layers * per_layer + 2 * shape.vocab * shape.hidden + tower) / 1e9
    named = 8 if name.startswith("minicpm") else float(name.rsplit("-", 1)[1][:-1])
    assert 0.9 * named < billions < 1.2 * named


@pytest.mark.parametrize("name", sorted(plugins.offered_adapters()))
def test_every_family_with_a_video_of_its_own_can_be_planned(name: str) -> None:
    if name in ("decoder", "hybrid"):  # The one needs the user's layout, the other is refused.
        with pytest.raises(UnsupportedError, match=f"unknown model '{name}'"):
            architecture(name)
        return
    offered = plugins.offered_adapters()[name].item
    known = architecture(name)
    assert known.note == f"family {name}, planned as {known.checkpoint}"
    assert architecture(known.checkpoint).shape == known.shape
    assert any(
        size in known.checkpoint for checkpoint in offered.checkpoints for size in ("7b", "7B", "8B", "V-2_6", "2.2B")
    )
    assert plan("framefusion", name).relative_tokens <= 0.3


def test_numbers_of_the_paper_and_of_upstream() -> None:
    llava, minicpm = architecture("llava-video-7b"), architecture("minicpm-v-2.6")
    assert llava.tokens() == 64 * 210 + 34
    assert (llava.threshold, minicpm.threshold) == (0.6, 0.7)
    assert minicpm.tokens(64) == 4311
    assert architecture("qwen2.5-vl-7b").vision_tokens(5) == 3 * 180


def test_a_config_is_planned_with_the_input_of_its_family(tmp_path: Any) -> None:
    facts = {**TINY, "model_type": "minicpmv", "hidden_act": "silu", "torch_dtype": "float32"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(facts))
    ours: Architecture = architecture(path)
    assert (ours.shape.layers, ours.tokens_per_frame, ours.threshold, ours.dtype_bytes) == (3, 67, 0.7, 4)
    assert "taken from minicpm-v-2.6" in ours.note
    path.write_text(json.dumps(facts | {"model_type": "llama"}))
    assert (architecture(tmp_path).tokens_per_frame, architecture(tmp_path).threshold) == (210, None)


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(UnsupportedError, match="did you mean 'llava-video-7b'"):
        architecture("llava-video7b")
    with pytest.raises(UnsupportedError, match="No such file"):
        architecture("missing.json")
    with pytest.raises(BudgetError, match="at least 1 frame"):
        architecture("llava-video-7b").tokens(0)
