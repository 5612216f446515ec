"""Padding in an earlier turn stays padding: each row of a ragged batch says what it says alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny import TOKENS, layout, prompt, tiny_model
from transformers import DynamicCache

import tokenreduce as tr
from tokenreduce.errors import UnsupportedError

FIRST, LAST = 6, 5
PADS = (0, 2)
"""Padding of the rows in each turn of text."""


def text(tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(2, 64, (2, tokens), generator=torch.Generator().manual_seed(seed))


def padded(tokens: int, other_way: bool = False) -> torch.Tensor:
    mask = torch.ones(2, tokens, dtype=torch.long)
    for row, pad in enumerate(reversed(PADS) if other_way else PADS):
        mask[row, :pad] = 0
    return mask


def turns(model: Any, rows: slice, run: Any, attach_late: Any = None) -> list[torch.Tensor]:
    """Logits of a turn of text, a turn with a video, and another of text, in one cache; only of real tokens if one row."""
    alone = rows.stop - rows.start == 1
    parts = [(text(FIRST, 1), padded(FIRST)), (prompt(3, rows=2), torch.ones(2, TOKENS, dtype=torch.long))]
    parts.append((text(LAST, 2), padded(LAST, other_way=True)))
    cache, masks, out = DynamicCache(config=model.config), [], []
    for number, (ids, mask) in enumerate(parts):
        ids, mask = ids[rows], mask[rows]
        if alone:
            ids, mask = ids[:, mask[0].bool()], mask[:, mask[0].bool()]
        masks.append(mask)
        whole = torch.cat(masks, 1)
        if number == 1:
            run.layout = layout()
        positions = (whole.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=whole, position_ids=positions, past_key_values=cache).logits
        out.append(logits[:, -1])
    return out


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("preset", ["framefusion", "fastv", "random"])
def test_ragged_turns(preset: str, attention: str) -> None:
    # transformers' eager attention gives NaN for padding in float64, without us too.
    model, tolerance = (tiny_model(attention), 5e-5) if attention == "eager" else (tiny_model(attention).double(), 1e-6)
    with tr.reduce(model, preset, budget=0.8, layout=tr.TokenLayout.text(1, FIRST)) as run:
        together = turns(model, slice(0, 2), run)
        for row in range(2):
            run.layout = tr.TokenLayout.text(1, FIRST - PADS[row])
            alone = turns(model, slice(row, row + 1), run)
            for ours, theirs in zip(together, alone, strict=True):
                torch.testing.assert_close(ours[row], theirs[0], atol=tolerance, rtol=0)
        run.layout = tr.TokenLayout.text(1, FIRST)


def test_padding_after_a_span_is_refused() -> None:
    model = tiny_model()
    with (
        tr.reduce(model, "streaming_llm", budget=0.8, layout=tr.TokenLayout.text(1, FIRST)) as run,
        pytest.raises(UnsupportedError, match="stages at `kv` sites do not support padding in a later turn"),
    ):
        turns(model, slice(0, 2), run)
