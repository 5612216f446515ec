"""The identity probe: what it proves, what it refuses, and that it leaves no mark."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support.families import TEXT
from support.tiny import SHARE, assert_same, layout, logits, snapshot, tiny_model
from tokenreduce_adapters.decoder import DecoderAdapter
from torch import nn

import tokenreduce as tr
from tokenreduce.adapter import FfnPair
from tokenreduce.engine.cache.layers import running
from tokenreduce.engine.model import tap
from tokenreduce.engine.model.host import Host
from tokenreduce.engine.model.probe import prove_decoder
from tokenreduce.errors import UnsupportedError


def hosted(model: Any) -> Host:
    return Host(model, DecoderAdapter())


def prove(model: Any, pairs: dict[int, FfnPair] | None = None) -> None:
    """The probe as attach runs it: with the tap in place."""
    host = hosted(model)
    pairs = host.pairs(list(range(len(host.layers)))) if pairs is None else pairs
    model.config._attn_implementation_internal = tap.tapped(host.implementation)
    try:
        prove_decoder(host.text, host.family, host.layers, pairs, host.facts.modules)
    finally:
        model.config._attn_implementation_internal = host.implementation


def decoder(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**TEXT, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 1.0, std=0.2)
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral", "phi3", "gemma3_text", "glm4", "olmo2"])
def test_families_that_pass(kind: str, attention: str) -> None:
    model = decoder(kind, head_dim=16)
    model.set_attn_implementation(attention)
    before = snapshot(model)
    prove(model)
    assert_same(model, before)


def test_gemma2_passes() -> None:
    """Apart, because transformers gives it eager attention only."""
    prove(decoder("gemma2", head_dim=16))


def test_granite_is_refused() -> None:
    model = decoder("granite", residual_multiplier=0.3)
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=r"GraniteForCausalLM \(decoder\): layer 0 is not x \+ FFN\(x\)"):
        prove(model)
    assert_same(model, before)


@pytest.mark.parametrize("kind", ["gemma2", "glm4", "olmo2"])
def test_the_usual_pair_is_wrong_for_some_families(kind: str) -> None:
    """Where the layer norms the FFN's output, (post_attention_layernorm, mlp) is refused: the adapter must say better."""
    model = decoder(kind, head_dim=16)
    pairs = {1: FfnPair(model.model.layers[1].post_attention_layernorm, model.model.layers[1].mlp)}
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=r"layer 1 is not x \+ FFN\(x\) .* adapter's ffn_pair\(\)"):
        prove(model, pairs)
    assert_same(model, before)


def test_one_odd_layer_is_found() -> None:
    """Every layer with a stage before its FFN is proved, not the first alone."""
    model = tiny_model()
    layer = model.model.layers[2]
    layer.mlp.register_forward_hook(lambda module, args, out: out)
    layer.register_forward_hook(lambda module, args, out: out * 1.5)
    with pytest.raises(UnsupportedError, match=r"layer 2 is not x \+ FFN\(x\)"):
        prove(model)
    prove(model, {0: FfnPair(model.model.layers[0].post_attention_layernorm, model.model.layers[0].mlp)})


def test_modules_that_never_run_are_no_pair() -> None:
    model = tiny_model()
    stray = nn.Identity()
    with pytest.raises(UnsupportedError, match=r"layer 0 is not x \+ FFN\(x\)"):
        prove(model, {0: FfnPair(stray, model.model.layers[0].mlp)})


def test_attention_that_goes_its_own_way() -> None:
    """A layer whose attention does not pass transformers' interface could not have its masks corrected."""
    model = tiny_model()
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (hidden_states * 0.5, None)
    before = snapshot(model)
    with pytest.raises(
        UnsupportedError, match="attention of layer 1 does not go through transformers' attention interface"
    ):
        tr.reduce(model, "random", budget=0.8, layout=layout())
    assert_same(model, before)


def test_it_leaves_the_mode_and_the_random_numbers_alone() -> None:
    model = tiny_model().train()
    model.model.layers[3].mlp.eval()
    before, state = snapshot(model), torch.random.get_rng_state()
    prove(model)
    assert_same(model, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert running.forward is None


def test_it_makes_no_gradient() -> None:
    model = tiny_model()
    prove(model)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_runs_in_the_models_own_precision() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        model = tiny_model().to(dtype)
        prove(model)
        with tr.reduce(model, "framefusion", budget=0.8, layout=layout()):
            assert logits(model).dtype == dtype


def test_an_unknown_attention_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="'paged\\|nothing' makes no masks that token reduction knows"):
        tap.tapped("paged|nothing")


def test_a_decoder_is_probed_once_as_long_as_it_stays_the_same() -> None:
    model = tiny_model()
    calls: list[object] = []

    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append("layer"))
    tr.reduce(model, "framefusion", budget=SHARE, layout=layout()).detach()
    tr.reduce(model, "framefusion", budget=SHARE, layout=layout()).detach()
    assert calls == ["layer"]
    tr.reduce(model, "prune_only", budget=SHARE, layout=layout()).detach()
    assert calls == ["layer"] * 2  # Its stage is in another layer.
    layer = model.model.layers[1]
    other = layer.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(UnsupportedError, match="not x"):
        tr.reduce(model, "framefusion", budget=SHARE, layout=layout())
    other.remove()
    tr.reduce(model, "framefusion", budget=SHARE, layout=layout()).detach()
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs) * 2
    with pytest.raises(UnsupportedError, match="not x"):
        tr.reduce(model, "framefusion", budget=SHARE, layout=layout())
    handle.remove()


def test_a_rotary_table_that_has_grown_is_left_so() -> None:
    """Dynamic NTK: three tokens would make it that of a short input again, and the next logits others."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = decoder("llama", max_position_embeddings=16, rope_parameters=rope)
    ids = torch.randint(2, 60, (1, 64))
    with torch.no_grad():
        model(ids)
        grown, before = model.model.rotary_emb.inv_freq.clone(), snapshot(model)
        tr.reduce(model, {"stages": [{"strategy": "random", "keep": 0.5}]}, layout=layout()).detach()
    assert torch.equal(model.model.rotary_emb.inv_freq, grown)
    assert model.model.rotary_emb.max_seq_len_cached == 64
    assert_same(model, before)


@pytest.mark.parametrize(("kind", "named"), [("gemma2", "softcap"), ("gpt_oss", "s_aux")])
def test_attention_that_importance_is_not_defined_for(kind: str, named: str) -> None:
    """Refused when it is attached, where a stage reads it: within a forward, the caller's cache would be half filled."""
    model = decoder(kind, layer_types=["full_attention"] * TEXT["num_hidden_layers"])
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=f"importance is not defined for attention with {named}"):
        tr.reduce(model, "fastv", budget=0.8, layout=layout())
    assert_same(model, before)
    with tr.reduce(model, {"stages": [{"strategy": "random", "keep": 0.5}]}, layout=layout()) as run:
        logits(model)
        assert len(run.trace.kept[0]) < layout().shape[1]


def test_a_decoder_with_a_cache_of_its_own() -> None:
    model = decoder("minimax", layer_types=["full_attention"] * TEXT["num_hidden_layers"])
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match="does not run on a plain DynamicCache: ValueError: MiniMax uses cache"):
        tr.reduce(model, {"stages": [{"strategy": "random", "keep": 0.5}]}, layout=layout())
    assert_same(model, before)


def test_flex_attention_is_measured() -> None:
    """A kernel that knows no dispatch modes: its FLOPs are counted by its shapes."""
    model = tiny_model("flex_attention")
    with tr.reduce(model, "fastv", budget={"flops": 0.9}, layout=layout()) as run:
        assert run.host.cached == [2 * model.config.num_key_value_heads * run.shape.head_dim] * run.shape.layers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_said_to_be_so(value: float) -> None:
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = value
    kind = "NaN" if value != value else "infinite"
    with pytest.raises(
        UnsupportedError, match=rf"{kind} values are in its weights, first in layers\.1\.mlp\.down_proj"
    ):
        prove(model)


def test_numbers_that_overflow_are_not_blamed_on_the_adapter() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight.data.fill_(3e38)
    with pytest.raises(UnsupportedError, match=r"what comes out of the FFN of layer 1 is not finite .* wider dtype"):
        prove(model)
