"""A tiny Qwen2 with one video in its prompt, and a picture of everything that an attachment may leave behind."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import tokenreduce as tr
from tokenreduce.errors import TokenReduceError, UnsupportedError

SHARE = 0.8
"""A budget that every preset can meet with four layers."""
BEFORE, FRAMES, PER_FRAME, AFTER = 3, 4, 6, 5
TOKENS = BEFORE + FRAMES * PER_FRAME + AFTER
DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)
PRESETS = ("framefusion", "fastv", "merge_only", "prune_only", "random", "uniform_frames", "streaming_llm")
PRESETS += ("framefusion_official", "noncascaded_merge", "prune_then_merge", "framefusion_equal")


def tiny_config(**changes: Any) -> Qwen2Config:
    return Qwen2Config(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
            **changes,
        }
    )


def tiny_model(attention: str = "sdpa", seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(tiny_config(**changes)).eval()
    model.set_attn_implementation(attention)
    return model


def layout() -> tr.TokenLayout:
    return tr.TokenLayout.video(before=BEFORE, frames=FRAMES, per_frame=PER_FRAME, after=AFTER)


def prompt(seed: int = 0, rows: int = 1) -> Tensor:
    """(rows, TOKENS) ids; every other token of a frame is that of the frame before, so that merging finds something."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (rows, TOKENS), generator=generator)
    video = ids[:, BEFORE : BEFORE + FRAMES * PER_FRAME].view(rows, FRAMES, PER_FRAME)
    video[:, 1:, ::2] = video[:, :1, ::2]
    return ids


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=prompt() if ids is None else ids, use_cache=False).logits


def generate(model: Any, ids: Tensor | None = None, tokens: int = 4, **options: Any) -> Any:
    ids = prompt() if ids is None else ids
    mask = torch.ones_like(ids)
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that must be as before: hooks, instance attributes, modes, configurations, parameters."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return {
        "hooks": {name: [list(getattr(m, d).items()) for d in DICTS] for name, m in model.named_modules()},
        "attributes": {name: sorted(m.__dict__) for name, m in model.named_modules()},
        "forwards": {name: m.__dict__.get("forward") for name, m in model.named_modules()},
        "training": [m.training for m in model.modules()],
        "configs": [(config.to_dict(), copy.deepcopy(config.__dict__)) for config in configs.values()],
        "attention": [config._attn_implementation for config in configs.values()],
        "generation": model.generation_config.to_dict() if hasattr(model, "generation_config") else None,
        "bits": {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict().items()},
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    """The model is as it was when `before` was taken, bit for bit."""
    after = snapshot(model)
    bits, were = after.pop("bits"), dict(before)
    old = were.pop("bits")
    assert set(bits) == set(old)
    for name, (place, tensor) in bits.items():
        assert place == old[name][0]
        assert torch.equal(tensor, old[name][1])
    for name, value in after.items():
        if name == "configs":
            assert str(value) == str(were[name])
        else:
            assert value == were[name], name


def hooks(model: nn.Module) -> int:
    return sum(len(getattr(module, each)) for module in model.modules() for each in DICTS)


def live_tensors() -> int:
    gc.collect()
    return sum(1 for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter))


def forward(model: Any, **options: Any) -> torch.Tensor:
    ids = options.pop("ids", prompt())
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def refused(
    model: Any, call: Callable[[Any], Any], match: str, error: type[TokenReduceError] = UnsupportedError
) -> None:
    """`call` is refused with one line, no layer has run, and the model is as it was; a plain prompt still works."""
    before, ran = snapshot(model), []
    with tr.reduce(model, "random", budget=SHARE, layout=layout()):
        handle = model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
        with pytest.raises(error, match=match) as caught:
            call(model)
        handle.remove()
        assert not ran
        assert "\n" not in str(caught.value)
        model.eval()
        forward(model)
    assert_same(model, before)


def causal(rows: int = 1) -> Tensor:
    return torch.ones(TOKENS, TOKENS).tril().bool().expand(rows, 1, -1, -1)
