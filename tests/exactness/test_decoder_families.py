"""Many decoder families of transformers, each held to itself: the dense model in which what was dropped is hidden.

The oracle knows no family: it is the model's own forward over the whole input, without a cache and with the family's own eager
attention, to which one thing is added: from the layer of the stage on, keys that are gone are masked in the mask that the model
itself has made, and merged states are written over the token that stays.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import tokenreduce as tr

LAYERS, FIRST = 4, 1
"""Depth, and the layer at which the stage acts."""
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 6, "sliding_window": 512, "attention_dropout": 0.0,
}  # fmt: skip
"""What a family's configuration has of these it is given."""
WIDE = {"num_key_value_heads": 4, "head_dim": ...}
"""Of latent attention, whose widths of heads are its own."""
OWN: dict[str, dict[str, Any]] = {
    "deepseek_v3": WIDE,
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 2.0},
    "helium": {"head_dim": 8},
}  # fmt: skip
FAMILIES = (
    *(
        "apertus",
        "arcee",
        "cohere",
        "cohere2",
        "cwm",
        "deepseek_v3",
        "diffllama",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma2",
    ),
    *(
        "gemma3_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "helium",
        "hunyuan_v1_dense",
        "llama",
    ),
    *(
        "ministral",
        "ministral3",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "persimmon",
        "phi",
        "phi3",
    ),
    *("phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2"),
)
BEFORE, FRAMES, SLOTS, AFTER = 4, 6, 5, 5
TOKENS = BEFORE + FRAMES * SLOTS + AFTER
HIDING = "hiding_for_tests"
hidden: dict[int, Tensor] = {}
"""Of each layer, (N,) bool, the keys that nobody is to see."""


def hiding(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any) -> Any:
    """The family's eager attention, without the keys in `hidden`."""
    gone = hidden.get(module.layer_idx)  # type: ignore[arg-type]
    if gone is not None:
        gone = nn.functional.pad(gone, (0, key.shape[2] - len(gone)))
        mask = mask.masked_fill(gone[None, None, None], torch.finfo(torch.float32).min)
    return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, mask, **kwargs)


AttentionInterface.register(HIDING, hiding)
AttentionMaskInterface.register(HIDING, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def decoder(kind: str) -> Any:
    """A tiny random model in float64, whose windows are wider than the input."""
    default = CONFIG_MAPPING[kind]()
    sizes = {name: value for name, value in {**SIZES, **OWN.get(kind, {})}.items() if hasattr(default, name)}
    if getattr(default, "layer_types", None) is not None:
        sizes["layer_types"] = None
    config = CONFIG_MAPPING[kind](**{name: value for name, value in sizes.items() if value is not ...})
    torch.manual_seed(0)
    model = (
        AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
        .double()
        .eval()
    )
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model


@contextmanager
def oracle(model: Any, source: Tensor) -> Iterator[None]:
    """`model` as if its tokens (N,) had gone to `source` at layer FIRST: the position each ended in, −1 if dropped."""
    groups = [(head, (source == head).nonzero()[:, 0]) for head in source.unique().tolist() if head >= 0]
    merged = [(head, members) for head, members in groups if len(members) > 1]

    def write(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        for head, members in merged:
            x[:, head] = x[:, members].mean(1)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    gone = source != torch.arange(len(source))
    hidden.update(dict.fromkeys(range(FIRST, LAYERS), gone))
    handle = model.base_model.layers[FIRST].register_forward_pre_hook(write, with_kwargs=True)
    before, model.config._attn_implementation_internal = model.config._attn_implementation_internal, HIDING
    try:
        yield
    finally:
        model.config._attn_implementation_internal = before
        handle.remove()
        hidden.clear()


@pytest.mark.parametrize(
    "stage", [{"strategy": "random", "keep": 0.5}, {"strategy": "similarity_merge", "threshold": 0.2}]
)
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_against_itself(kind: str, stage: dict[str, Any]) -> None:
    """States that are left, and four words after them on the cache, are those of the dense model that hides the others.

    Within 5e-5: eager attention takes its softmax in float32."""
    model = decoder(kind)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 64, (1, TOKENS + 4), generator=generator)
    video = ids[0, BEFORE : BEFORE + FRAMES * SLOTS].view(FRAMES, SLOTS)
    video[1:, ::2] = video[:1, ::2]  # Something to merge.
    where = tr.TokenLayout.video(before=BEFORE, frames=FRAMES, per_frame=SLOTS, after=AFTER)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        with tr.reduce(model, {"stages": [{**stage, "at": FIRST}]}, layout=where) as run:
            first = model(input_ids=ids[:, :TOKENS], past_key_values=cache).logits[0]
            words = [
                model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits[0] for i in range(TOKENS, TOKENS + 4)
            ]
            kept, source = run.trace.kept[0], run.trace.source[0]
        assert 0 < TOKENS - len(kept) < FRAMES * SLOTS
        with oracle(model, source):
            whole = model(input_ids=ids, use_cache=False).logits[0]
        plain = model(input_ids=ids, use_cache=False).logits[0]
    scale = float(whole.abs().max())
    assert float((first - whole[kept]).abs().max()) < 5e-5 * max(scale, 1)
    assert float((torch.cat(words) - whole[TOKENS:]).abs().max()) < 5e-5 * max(scale, 1)
    assert float((plain - whole)[kept].abs().max()) > 1e-3 * scale  # The stage mattered.
