"""A stage before a layer that reads the layer's own attention, against what eager attention then returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.decoders import account
from support.double import Double, plugin  # noqa: F401
from support.tiny import TOKENS, layout, prompt, tiny_model
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

import tokenreduce as tr
from tokenreduce.errors import PipelineError, UnsupportedError
from tokenreduce.pipeline import build, load_pipeline
from tokenreduce.planning.schedule import forecast
from tokenreduce.strategy import Capabilities, CountView, Outcome, StageContext

KINDS = ("qwen2", "qwen3", "llama", "mistral", "phi3", "gemma2", "olmo2", "glm4", "granite", "stablelm")


@pytest.fixture(autouse=True)
def _ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    may = Capabilities(sites=("pre_attention",), attention=True, own_attention=True, content_dependent=True)
    monkeypatch.setattr(Double, "capabilities", may)


def decoder(kind: str) -> Any:
    config = CONFIG_MAPPING[kind](
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    if getattr(config, "attn_logit_softcapping", None):
        config.attn_logit_softcapping = None
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 2])
def test_what_the_layer_then_computes(kind: str, layer: int) -> None:
    """After a stage that drops at layer 1 and without one; logits keep their bits."""
    model, found, weights = decoder(kind), list[Tensor](), list[Tensor]()
    ids = torch.cat([prompt(), prompt(1)])

    def act(ctx: StageContext) -> Any:
        if ctx.site.layer == 1:
            return ctx.keep(ctx.slot < 3)
        found.append(ctx.attention(torch.arange(ctx.n), "each", "each"))
        return None

    Double.act = staticmethod(act)  # type: ignore[assignment]
    both = tr.TokenLayout(slot=layout().slot.repeat(2, 1), frame=layout().frame.repeat(2, 1))
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        with tr.reduce(
            model,
            {"stages": [{"strategy": "double", "at": [1, 2] if layer else 0}]},
            layout=both,
        ):
            handle = model.model.layers[layer].self_attn.register_forward_hook(
                lambda _, args, out: weights.append(out[1])
            )
            logits = model(input_ids=ids).logits
            handle.remove()
    for row in (0, 1):
        assert torch.allclose(found[row], weights[0][row], atol=1e-6)
    assert torch.equal(logits, dense) == (layer == 0)


def test_a_later_turn() -> None:
    """In a second turn with a video the keys that the first has left are seen, too."""
    model, found, weights = tiny_model("eager"), list[Tensor](), list[Tensor]()

    def act(ctx: StageContext) -> Any:
        scores = ctx.attention()
        found.append(scores)
        return ctx.keep_top(scores, 10) if len(found) == 1 else None

    Double.act = staticmethod(act)  # type: ignore[assignment]
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), tr.reduce(model, {"stages": [{"strategy": "double", "at": 1}]}, layout=layout()) as run:
        model(input_ids=prompt(), past_key_values=cache)
        held = cache.layers[1].keys.shape[2]
        run.layout = layout()
        handle = model.model.layers[1].self_attn.register_forward_hook(lambda _, args, out: weights.append(out[1][0]))
        model(input_ids=prompt(1), past_key_values=cache)
        handle.remove()
    assert held == 8 + 10
    assert torch.allclose(found[1], weights[0][:, -1, held:].mean(0), atol=1e-6)
    assert float(weights[0][:, -1, :held].sum()) > 0.1


def test_forecast_is_trace_and_odd_budgets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    may = Capabilities(sites=("pre_attention",), attention=True, own_attention=True, chooses_count=True)
    monkeypatch.setattr(Double, "capabilities", may)

    def told(self: Double, view: CountView) -> Outcome:
        view.attention("last")
        return super(Double, self).forecast(view)

    monkeypatch.setattr(Double, "forecast", told)
    Double.act = staticmethod(lambda ctx: ctx.keep_top(ctx.attention(), 12))  # type: ignore[assignment]
    pipeline = {"stages": [{"strategy": "double", "at": [0, 2], "keep": 0.5}]}
    model = tiny_model()
    with torch.no_grad(), tr.reduce(model, pipeline, layout=layout()) as run:
        model(input_ids=prompt())
        planned = account(None, TOKENS, 24)
        forecast(build(load_pipeline(pipeline)), planned)
        assert planned.selector_flops == run.trace.selector_flops > 0
        assert planned.kv == [int(layer.tokens.sum()) for layer in run.trace.layers]
    with pytest.raises(PipelineError, match="looks at attention ahead of its layer, whose cost cannot be planned"):
        tr.reduce(model, pipeline | {"budget": {"flops": 0.5}}, layout=layout())
    model.model.compile(backend="eager")
    with (
        torch.no_grad(),
        tr.reduce(model, pipeline, layout=layout()),
        pytest.raises(UnsupportedError, match="ahead of its layer"),
    ):
        model(input_ids=prompt())
