"""Gradients flow through merge and prune to what was kept, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StableLmConfig, StableLmForCausalLM

import tokenreduce as tr
from tokenreduce.errors import UnsupportedError

LAYOUT = tr.TokenLayout.video(before=1, frames=4, per_frame=2, after=2)
TOKENS, WIDTH = 11, 8
PIPELINES: dict[str, Any] = {
    "merge": {"stages": [{"strategy": "similarity_merge", "threshold": 0.2, "stop_below": 0.0}]},
    "merge and prune": {
        "stages": [
            {"strategy": "similarity_merge", "threshold": 0.3, "stop_below": 0.5},
            {"strategy": "importance_prune", "keep": 0.4},
        ]
    },
    "prune before the FFN": {"stages": [{"strategy": "importance_prune", "at": 1, "keep": 0.4}]},
    "prune before attention": {"stages": [{"strategy": "random", "at": 1, "keep": 0.5}]},
    "merge keys and values": {"stages": [{"strategy": "similarity_merge", "site": "kv", "at": [0, 2], "keep": 0.5}]},
    "span": {"stages": [{"strategy": "streaming_window", "sinks": 1, "window": 4}]},
}


@pytest.fixture
def model() -> StableLmForCausalLM:
    """In float64 throughout: StableLM's norms are torch's own, where other families compute theirs in float32."""
    torch.manual_seed(0)
    config = StableLmConfig(
        vocab_size=20, hidden_size=WIDTH, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.4, attention_dropout=0.0,
    )  # fmt: skip
    return StableLmForCausalLM(config).double().eval()


@pytest.fixture
def embeds() -> Tensor:
    """(1, N, D): frames that resemble the one before."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    for column in range(3, 9):
        x[:, column] = x[:, column - 2] + 0.8 * x[:, column]
    return x.requires_grad_()


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("use_cache", [False, True])
def test_gradcheck(model: Any, embeds: Tensor, name: str, use_cache: bool) -> None:
    with tr.reduce(model, PIPELINES[name], layout=LAYOUT) as run:

        def last_logits(x: Tensor) -> Tensor:
            logits: Tensor = model(inputs_embeds=x, use_cache=use_cache).logits
            return logits[:, -2:]

        # Each partial derivative for one pipeline, one random combination of them for the others.
        every = name == "merge and prune" and not use_cache
        assert torch.autograd.gradcheck(last_logits, (embeds,), fast_mode=not every)
        assert sum(stage.before - stage.after for stage in run.trace.stages) > 0, "nothing was reduced"


def test_dropped_tokens_get_none_and_merged_ones_their_share(model: Any, embeds: Tensor) -> None:
    """Before layer 0, a merged token has 1/size of its group's gradient, a dropped one nothing."""
    pipeline = {"stages": [{"strategy": "similarity_merge", "keep": 0.5}]}
    with tr.reduce(model, pipeline, layout=LAYOUT) as run:
        model(inputs_embeds=embeds).logits[:, -1].square().sum().backward()
        source = run.trace.source[0]
    assert embeds.grad is not None
    grad = embeds.grad[0].clone()
    groups = {head: (source == head).nonzero()[:, 0].tolist() for head in source.unique().tolist()}
    assert any(len(members) > 2 for members in groups.values())
    for members in groups.values():
        for member in members:
            torch.testing.assert_close(grad[member], grad[members[0]], atol=1e-12, rtol=0)
    embeds.grad = None
    with tr.reduce(model, {"stages": [{"strategy": "random", "at": 0, "keep": 0.5}]}, layout=LAYOUT) as run:
        model(inputs_embeds=embeds).logits[:, -1].square().sum().backward()
        kept = run.trace.kept[0]
    assert embeds.grad is not None
    alone = embeds.detach()[:, kept].requires_grad_()
    model(inputs_embeds=alone, position_ids=kept[None]).logits[:, -1].square().sum().backward()
    assert alone.grad is not None
    torch.testing.assert_close(embeds.grad[:, kept], alone.grad, atol=1e-12, rtol=0)
    dropped = torch.ones(TOKENS, dtype=torch.bool)
    dropped[kept] = False
    assert not embeds.grad[0, dropped].any()


def test_training_mode(model: Any, embeds: Tensor) -> None:
    """Without dropout, training mode is evaluation mode with gradients for every weight that was used; with it, refused."""
    pipeline = PIPELINES["merge and prune"]
    with tr.reduce(model, pipeline, layout=LAYOUT):
        model(inputs_embeds=embeds).logits[:, -1].sum().backward()
        wanted = {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }
        model.zero_grad()
        model.train()
        model(inputs_embeds=embeds).logits[:, -1].sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (name not in wanted)
            assert parameter.grad is None or torch.equal(parameter.grad, wanted[name])
        assert "model.layers.0.mlp.down_proj.weight" in wanted
        model.model.layers[0].self_attn.attention_dropout = model.config.attention_dropout = 0.1
        with pytest.raises(UnsupportedError, match="dropout"):
            model(inputs_embeds=embeds)
