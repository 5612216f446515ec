"""Calls whose meaning changes once tokens are gone: given by place or by name, they are right or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.tiny import assert_same, generate, layout, logits, prompt, snapshot, tiny_model
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import tokenreduce as tr
from tokenreduce.errors import AttachError, UnsupportedError

HALF = {"name": "half", "stages": [{"strategy": "random", "at": 1, "keep": 0.5}]}
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_arguments_by_place() -> None:
    """The decoder called with (ids, mask), (ids, None, None, cache) or (…, embeds) is what it is by names."""
    model = tiny_model()
    ids = prompt(rows=2)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with tr.reduce(model, HALF, layout=layout()) as run:
        expected = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        kept = run.trace.kept
        out = model.model(ids, mask).last_hidden_state
        assert torch.equal(out, expected)
        assert [row.tolist() for row in run.trace.kept] == [row.tolist() for row in kept]
    cache = DynamicCache(config=model.config)
    with tr.reduce(model, HALF, layout=layout()) as run:
        expected = model.model(input_ids=ids[:1]).last_hidden_state
        assert torch.equal(model.model(ids[:1], None, None, cache).last_hidden_state, expected)
        assert cache.get_seq_length() == ids.shape[1]
        embeds = model.get_input_embeddings()(ids[:1])
        assert torch.equal(model.model(None, None, None, None, embeds).last_hidden_state, expected)
        with pytest.raises(UnsupportedError, match="a 4-D attention mask is not supported"):
            model.model(ids[:1], torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool))
        with pytest.raises(UnsupportedError, match="labels are not supported"):
            model(ids[:1], None, None, None, None, ids[:1])


def test_logits_of_places() -> None:
    """A tensor of places would be read among the kept tokens; a number is right."""
    model = tiny_model()
    with tr.reduce(model, HALF, layout=layout()):
        whole = model(input_ids=prompt()).logits
        last = model(input_ids=prompt(), logits_to_keep=3).logits
        assert float((last - whole[:, -3:]).abs().max()) < 5e-5
        with pytest.raises(UnsupportedError, match="logits_to_keep as a tensor of places"):
            model(input_ids=prompt(), logits_to_keep=torch.tensor([5]))


def test_packed_sequences() -> None:
    """Positions that begin anew keep two sequences apart in the dense model, and nothing would after a reduction."""
    model, ids = tiny_model(), prompt()
    half = ids.shape[1] // 2
    packed = torch.cat([torch.arange(half), torch.arange(ids.shape[1] - half)])[None]
    later = 7 + torch.arange(ids.shape[1])[None]
    with tr.reduce(model, HALF, layout=layout()) as run:
        with pytest.raises(UnsupportedError, match="mean packed sequences"):
            model(input_ids=ids, position_ids=packed, use_cache=False)
        # With a mask they are one sequence for transformers too; and positions may begin anywhere.
        model(input_ids=ids, position_ids=packed, attention_mask=torch.ones_like(ids), use_cache=False)
        model(input_ids=ids, position_ids=later, use_cache=False)
        assert len(run.trace.kept[0]) < ids.shape[1]


def test_attention_that_is_not_causal() -> None:
    config = LlamaConfig(**SIZES, is_causal=False)
    with pytest.raises(UnsupportedError, match="is_causal=False"):
        tr.reduce(LlamaForCausalLM(config).eval(), HALF, layout=layout())


def test_router_logits() -> None:
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2)).eval()
    with tr.reduce(model, HALF, layout=layout()) as run:
        with pytest.raises(UnsupportedError, match="output_router_logits is not supported"):
            model(input_ids=prompt(), output_router_logits=True)
        model(input_ids=prompt())
        assert len(run.trace.kept[0]) < prompt().shape[1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_queries_scaled_by_position(attention: str) -> None:
    """Ministral 3 scales its queries by position ids in every layer: those of the tokens left are the originals'.

    The oracle: the dense model, in which the tokens that were dropped are hidden from layer 1 on."""
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "llama_4_scaling_beta": 0.5,
        "original_max_position_embeddings": 8,
    }
    torch.manual_seed(0)
    config = Ministral3Config(**SIZES, rope_parameters=rope, sliding_window=None)
    model = Ministral3ForCausalLM._from_config(config, attn_implementation=attention).double().eval()
    ids = prompt()
    with tr.reduce(model, HALF, layout=layout()) as run:
        ours = model(input_ids=ids).logits[0]
        kept = run.trace.kept[0]
    hidden = torch.ones(ids.shape[1], dtype=torch.bool)
    hidden[kept] = False
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()

    def hide(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        seen = (causal & ~hidden)[None, None]
        low = torch.finfo(torch.float64).min if attention == "sdpa" else torch.finfo(torch.float32).min
        return args, {**kwargs, "attention_mask": torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, low)}

    handles = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in model.model.layers[1:]]
    dense = model(input_ids=ids).logits[0, kept]
    for handle in handles:
        handle.remove()
    assert len(kept) < ids.shape[1]
    assert float((ours - dense).abs().max()) < (1e-6 if attention == "sdpa" else 5e-5)


def test_early_exit_leaves_the_depth_as_it_was() -> None:
    """transformers lowers the depth for a draft, and an error on the way would leave it so for good."""
    model = tiny_model()
    before = snapshot(model)
    with tr.reduce(model, HALF, layout=layout()), pytest.raises(UnsupportedError, match="assistant_early_exit"):
        generate(model, assistant_early_exit=1)
    assert_same(model, before)


def test_a_decoder_put_in_its_place() -> None:
    """Another decoder, or another layer, would run dense without a word."""
    model, other = tiny_model(), tiny_model()
    own, first = model.model, model.model.layers[1]
    with tr.reduce(model, HALF, layout=layout()):
        model.model = other.model
        with pytest.raises(AttachError, match="its decoder or a layer of it was replaced"):
            model(input_ids=prompt())
        model.model = own
        model.model.layers[1] = other.model.layers[1]
        with pytest.raises(AttachError, match="its decoder or a layer of it was replaced"):
            model(input_ids=prompt())
        model.model.layers[1] = first
        reduced: Tensor = model(input_ids=prompt()).logits
        assert reduced.shape[1] < prompt().shape[1]


def test_words_with_a_layout_of_text_alone() -> None:
    """The layout that a refusal asks for is used up by its turn; the next turn of words needs none."""
    model = tiny_model()
    with tr.reduce(model, HALF, layout=layout()) as run:
        cache = DynamicCache(config=model.config)
        model(input_ids=prompt(), past_key_values=cache)
        run.layout = tr.TokenLayout.text(1, 5)
        words = prompt()[:, :12]
        model(input_ids=words[:, :5], past_key_values=cache)
        last = model(input_ids=words[:, 5:], past_key_values=cache).logits
        cache = DynamicCache(config=model.config)
        run.layout = layout()
        model(input_ids=prompt(), past_key_values=cache)
        together = model(input_ids=words, past_key_values=cache).logits
    assert float((together[:, 5:] - last).abs().max()) < 5e-5


def test_padding_before_a_batch_of_one() -> None:
    """What is padding is not text that always stays: the budget is met by the call, not refused when it is attached."""
    model, columns = tiny_model(), prompt().shape[1]
    where = layout()
    pad = 3 * columns
    wide = tr.TokenLayout(*(nn.functional.pad(facts, (pad, 0), value=-1) for facts in (where.slot, where.frame)))
    ids = nn.functional.pad(prompt(), (pad, 0), value=0)
    mask = nn.functional.pad(torch.ones_like(prompt()), (pad, 0), value=0)
    with tr.reduce(model, "fastv", budget=0.8, layout=where) as run:
        expected = logits(model)
        kept = run.trace.kept[0].tolist()
    with tr.reduce(model, "fastv", budget=0.8, layout=wide) as run:
        out = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        assert [column - pad for column in run.trace.kept[0].tolist()] == kept
    assert float((out[0, -1] - expected[0, -1]).abs().max()) < 5e-5
