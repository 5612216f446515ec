"""What lies below the tap: masks that its softmax can bear, and implementations that look for their own name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from support.tiny import generate, layout, logits, tiny_model
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tokenreduce as tr

MERGE = {"stages": [{"strategy": "similarity_merge", "threshold": 0.6}]}


@pytest.mark.parametrize("use_cache", [True, False])
def test_eager_attention_in_float64_has_no_nan_in_padding_of_the_engine(use_cache: bool) -> None:
    """Its softmax is in float32, where the least float64 is −inf: a row of padding was NaN, and NaN · 0 is NaN."""
    rows = []
    for attention in ("eager", "sdpa"):
        model = tiny_model(attention).double()
        states = torch.randn(2, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        states[0, 3:27] = states[0, 3:9].repeat(4, 1)  # Frames that stand still, and noise.
        with torch.no_grad(), tr.reduce(model, MERGE, layout=layout()) as run:
            out = model(inputs_embeds=states, use_cache=use_cache).logits
        kept = [len(each) for each in run.trace.kept]
        assert kept[0] < kept[1]
        rows.append([row[-count:] for row, count in zip(out, kept, strict=True)])
    for eager, sdpa in zip(*rows, strict=True):
        torch.testing.assert_close(eager, sdpa, atol=1e-5, rtol=0)


def stand_in(query: Tensor, key: Tensor, value: Tensor, causal: bool = True, **kwargs: Any) -> Tensor:
    """The function of the flash_attn package: (B, n, H, d)."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    queries, keys = query.shape[2], key.shape[2]
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if causal else None
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, scale=kwargs.get("softmax_scale"), enable_gqa=True
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
def test_flash_attention_finds_its_own_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks up in the module's configuration which package to load; there, the tap is named."""
    asked = []

    def load(implementation: str, *_: Any, **__: Any) -> Any:
        asked.append(implementation)

        def options(*_: Any, **given: Any) -> dict[str, Any]:
            return {"softmax_scale": given["softmax_scale"], "causal": given.get("is_causal", True)}

        return (stand_in, stand_in, None, None, None), (options, options)

    monkeypatch.setattr(flash, "lazy_import_flash_attention", load)
    for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):  # As if a kernel of the hub had been loaded.
        monkeypatch.setitem(table._global_mapping, name, table["flash_attention_2"])
    model, other = tiny_model(), tiny_model()
    model.config._attn_implementation_internal = name
    torch.testing.assert_close(logits(model), logits(other), atol=1e-5, rtol=0)
    outs = []
    for each in (model, other):
        with tr.reduce(each, "merge_only", budget=0.8, layout=layout()):
            outs.append(torch.stack(generate(each).logits))
    assert set(asked) == {name}
    torch.testing.assert_close(*outs, atol=1e-5, rtol=0)
    assert model.config._attn_implementation == name
