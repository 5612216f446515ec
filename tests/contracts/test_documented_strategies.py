"""The strategies printed in docs/plugins.md do what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import TOKENS, layout, prompt, tiny_model
from transformers import DynamicCache

import tokenreduce as tr
from tokenreduce.hookspecs import hookimpl
from tokenreduce.plugins import manager

PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"


@pytest.fixture(autouse=True)
def _printed() -> Any:
    """Both classes, from the page's own text."""
    text = PAGE.read_text().partition("## What a strategy can see and say")[2]
    space: dict[str, Any] = {"__name__": "printed"}
    for block in re.findall(r"```python\n(.*?)```", text, re.S)[:2]:
        exec(compile(block, "docs/plugins.md", "exec", dont_inherit=True), space)

    class Plugin:
        @hookimpl
        def tokenreduce_strategies(self) -> list[Any]:
            return [space["FrameShares"], space["HeadsChoose"]]

    plugin = Plugin()
    manager().register(plugin, "printed:page")
    yield
    manager().unregister(plugin)


@pytest.mark.parametrize("keep", [0.5, 12, "1/2"])
def test_frame_shares(keep: Any) -> None:
    model, states = tiny_model(), []
    signal = torch.rand(1, TOKENS, 2, generator=torch.Generator().manual_seed(0))
    with (
        torch.no_grad(),
        tr.reduce(model, {"stages": [{"strategy": "frame_shares", "keep": keep}]}, layout=layout()) as run,
    ):
        run.signals = {"tower.mean": signal}
        handle = model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
        model(input_ids=prompt())
        handle.remove()
    x, source, kept = model.get_input_embeddings()(prompt())[0], run.trace.source[0], run.trace.kept[0]
    assert len(kept) == 8 + 12
    for place, token in enumerate(kept.tolist()):
        others = [i for i in range(TOKENS) if source[i] == token and i != token]
        mean = 0.5 * x[token] + 0.5 * x[others].mean(0) if others else x[token]
        assert torch.allclose(states[0][0, place], mean, atol=1e-6)


def test_heads_choose() -> None:
    model, cache = tiny_model(), DynamicCache()
    with torch.no_grad():
        dense = model(input_ids=prompt()).logits
        with tr.reduce(model, {"stages": [{"strategy": "heads_choose", "keep": 20}]}, layout=layout()) as run:
            assert torch.equal(model(input_ids=prompt(), past_key_values=cache).logits, dense)
            model(input_ids=prompt()[:, :3], past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [20 + 3] * 4
    assert [layer.tokens.tolist() for layer in run.trace.layers] == [[20]] * 4
    assert run.trace.selector_flops > 0
