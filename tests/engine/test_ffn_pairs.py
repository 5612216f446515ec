"""Which modules enclose the FFN of each decoder family, measured on its real layers.

With e what the pair's entry reads, y what its exit gives and o what the layer gives, a pair is right if o == e + y, bit
for bit. The table below is the expectation, for the pair that most families have and for the pair DecoderAdapter names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from tokenreduce_adapters.decoder import DecoderAdapter
from torch import Tensor, nn

from tokenreduce.adapter import FfnPair

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Case:
    """common: what (post_attention_layernorm, mlp) is. ours: the pair of DecoderAdapter, by module name, and what it is.

    right: o == e + y. wrong: another o. absent: the layer has no such modules, or no point between attention and FFN.
    """

    kind: str
    common: str
    ours: tuple[str, str] | None
    result: str
    settings: dict[str, Any] = field(default_factory=dict)


USUAL = ("post_attention_layernorm", "mlp")
SANDWICH = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
AFTER = ("mlp", "post_feedforward_layernorm")
HEAD = {"head_dim": 8}
SCALED = {"residual_multiplier": 0.3, "attention_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 2.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

CASES = [
    Case("qwen2", "right", USUAL, "right"),
    Case("qwen3", "right", USUAL, "right", HEAD),
    Case("llama", "right", USUAL, "right"),
    Case("mistral", "right", USUAL, "right", HEAD),
    Case("phi3", "right", USUAL, "right"),
    Case("gemma", "right", USUAL, "right", HEAD),
    Case("glm", "right", USUAL, "right", HEAD),
    Case("olmo", "right", USUAL, "right"),
    Case("starcoder2", "right", USUAL, "right"),
    Case("nemotron", "right", USUAL, "right", HEAD),
    Case("smollm3", "right", USUAL, "right"),
    Case("ernie4_5", "right", USUAL, "right", HEAD),
    Case("qwen2_moe", "right", USUAL, "right", EXPERTS),
    Case("qwen3_moe", "right", USUAL, "right", {**EXPERTS, **HEAD}),
    Case("gpt_oss", "right", USUAL, "right", {**HEAD, "num_local_experts": 4, "rope_parameters": None}),
    Case("stablelm", "right", USUAL, "right", {"use_parallel_residual": False}),
    Case("gpt_neox", "right", USUAL, "right", {"use_parallel_residual": False}),
    Case("gemma2", "wrong", SANDWICH, "right", HEAD),
    Case("gemma3_text", "wrong", SANDWICH, "right", HEAD),
    Case("glm4", "wrong", ("post_attention_layernorm", "post_mlp_layernorm"), "right", HEAD),
    Case("olmo2", "wrong", AFTER, "right"),
    Case("olmo3", "wrong", AFTER, "right"),
    Case("exaone4", "wrong", AFTER, "right", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    Case("vaultgemma", "absent", ("pre_feedforward_layernorm", "mlp"), "right", HEAD),
    Case("granite", "wrong", USUAL, "wrong", SCALED),
    Case("stablelm", "absent", None, "absent", {"use_parallel_residual": True}),
    Case("gpt_neox", "wrong", None, "absent", {"use_parallel_residual": True}),
    Case("cohere", "absent", None, "absent"),
    Case("phi", "absent", None, "absent"),
]


def random_decoder(case: Case) -> nn.Module:
    """A tiny decoder without a head, weights large enough that a wrong identity is off by far."""
    config = transformers.AutoConfig.for_model(case.kind, **{**SIZES, **case.settings})
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 1.0, std=0.2)
    return model


def named_pair(layer: Any, names: tuple[str, str] | None) -> FfnPair | None:
    modules = [getattr(layer, name, None) for name in names or ()]
    return FfnPair(*modules) if modules and all(isinstance(m, nn.Module) for m in modules) else None


def check(model: Any, pairs: list[FfnPair | None]) -> str:
    """Whether every layer's pair is right, on one random input."""
    if None in pairs:
        return "absent"
    notes: list[dict[str, Tensor]] = [{} for _ in pairs]
    handles = []
    for layer, pair, note in zip(model.layers, pairs, notes, strict=True):
        assert pair is not None
        handles.append(
            pair.entry.register_forward_pre_hook(lambda m, a, note=note: note.__setitem__("e", a[0].clone()))
        )
        for name, module in (("y", pair.exit), ("o", layer)):
            keep = lambda m, a, out, note=note, name=name: note.__setitem__(name, first(out).clone())  # noqa: E731
            handles.append(module.register_forward_hook(keep))
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(inputs_embeds=x)
    for handle in handles:
        handle.remove()
    return "right" if all(torch.equal(n["o"], n["e"] + n["y"]) for n in notes) else "wrong"


def first(output: Any) -> Tensor:
    """A module's state where it gives a tuple (mixtures of experts give their routing too)."""
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.result}")
def test_pair_of_each_family(case: Case) -> None:
    model: Any = random_decoder(case)
    adapter = DecoderAdapter()
    assert adapter.matches(model)
    layers = list(adapter.text_model(model).layers)
    ours = [adapter.ffn_pair(layer) for layer in layers]
    assert ours == [named_pair(layer, case.ours) for layer in layers]
    assert check(model, [named_pair(layer, USUAL) for layer in layers]) == case.common
    assert check(model, ours) == case.result


def test_granite_scales_outside_any_module() -> None:
    """Why no pair can be right there: o is e + 0.3 · y, and 0.3 is a number in the layer."""
    model: Any = random_decoder(next(case for case in CASES if case.kind == "granite"))
    layer, note = model.layers[0], {}
    layer.post_attention_layernorm.register_forward_pre_hook(lambda m, a: note.__setitem__("e", a[0].clone()))
    layer.mlp.register_forward_hook(lambda m, a, out: note.__setitem__("y", out.clone()))
    layer.register_forward_hook(lambda m, a, out: note.__setitem__("o", first(out).clone()))
    with torch.no_grad():
        model(inputs_embeds=torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1)))
    assert layer.residual_multiplier == 0.3
    assert torch.equal(note["o"], note["e"] + note["y"] * 0.3)
