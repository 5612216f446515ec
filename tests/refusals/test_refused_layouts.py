"""Layouts that are missing, wrong or stale are errors; prompts of text run dense."""

from __future__ import annotations

import pytest
import torch
from support.families import FAMILIES, Text, Video
from support.tiny import (
    SHARE,
    TOKENS,
    causal,
    forward,
    generate,
    layout,
    prompt,
    refused,
    tiny_model,
)
from transformers import DynamicCache, StaticCache

import tokenreduce as tr
from tokenreduce.errors import (
    LayoutError,
    UnsupportedError,
)


def test_a_layout_of_another_length() -> None:
    match = f"the layout given is for {TOKENS} tokens, the forward has {TOKENS - 1}"
    refused(tiny_model(), lambda model: forward(model, ids=prompt()[:, 1:]), match, LayoutError)


def test_a_later_layout_of_another_length() -> None:
    """A layout set for the next turn must be that turn's: another length is not taken for a turn of text."""
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    with tr.reduce(model, "random", budget=SHARE, layout=layout()) as run:
        forward(model, past_key_values=cache)
        run.layout = layout()
        with pytest.raises(LayoutError, match=f"the layout given is for {TOKENS} tokens, the forward has 7"):
            forward(model, ids=prompt()[:, :7], past_key_values=cache)


def test_a_failed_turn_can_be_tried_again() -> None:
    """The layout of a turn that failed still stands for its next try; it is used up only by a turn that ran."""
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    with tr.reduce(model, "random", budget=SHARE, layout=layout()) as run:
        forward(model, past_key_values=cache)
        first, run.layout = run.trace, layout()
        with pytest.raises(UnsupportedError):
            forward(model, past_key_values=cache, attention_mask=causal())
        forward(model, past_key_values=cache)
        second = run.trace
        assert second is not first
        forward(model, past_key_values=cache)  # Used up: the same length again is text.
        assert run.trace is second


def test_neither_ids_nor_layout() -> None:
    family = FAMILIES["qwen2_vl"]
    model = family.model()
    sample = family.sample([[Text(3), Video(2), Text(4)]])
    embeds = torch.randn(1, 12, 64)
    with tr.reduce(model, "random", budget=SHARE), torch.no_grad():
        with pytest.raises(
            LayoutError, match=r"where are the vision tokens\? The call has no input_ids for its 12 tokens"
        ):
            model(inputs_embeds=embeds)
        cache = model(**sample.inputs).past_key_values
        with pytest.raises(LayoutError, match="where are the vision tokens"):
            model(inputs_embeds=embeds, past_key_values=cache)


def test_ids_of_a_call_that_failed_are_not_used_for_the_next() -> None:
    family = FAMILIES["qwen2_vl"]
    model = family.model()
    sample = family.sample([[Text(3), Video(2), Text(4)]])
    tokens = sample.inputs["input_ids"].shape[1]
    broken = {**sample.inputs, "pixel_values_videos": sample.inputs["pixel_values_videos"][:, :3]}
    with tr.reduce(model, "random", budget=SHARE), torch.no_grad():
        with pytest.raises(RuntimeError):
            model(**broken)
        with pytest.raises(LayoutError, match="where are the vision tokens"):
            model(inputs_embeds=torch.randn(1, tokens, 64))


def test_a_decoder_without_a_layout() -> None:
    model = tiny_model()
    with (
        tr.reduce(model, "random", budget=SHARE),
        pytest.raises(LayoutError, match="has no vision tokens of its own; pass layout"),
    ):
        forward(model)


def test_text_prompts_run_dense() -> None:
    """Any cache, any mask, in the middle of anything: nothing is reduced, so nothing is refused."""
    model, ids = tiny_model(), prompt()
    static = StaticCache(model.config, max_cache_len=64)
    dense = forward(model), forward(model, attention_mask=causal()), forward(model, past_key_values=static)
    expected = generate(model)
    with tr.reduce(model, "random", budget=SHARE, layout=tr.TokenLayout.text(1, TOKENS)):
        assert torch.equal(forward(model, ids=ids), dense[0])
        assert torch.equal(forward(model, attention_mask=causal()), dense[1])
        static = StaticCache(model.config, max_cache_len=64)
        assert torch.equal(forward(model, past_key_values=static), dense[2])
        assert torch.equal(torch.stack(generate(model).logits), torch.stack(expected.logits))


def test_a_protected_video() -> None:
    model = tiny_model()
    plain = layout()
    guarded = tr.TokenLayout(slot=plain.slot, frame=plain.frame, protected=plain.vision)
    with (
        tr.reduce(model, "random", budget=SHARE, layout=guarded),
        pytest.raises(LayoutError, match="row 0 has vision tokens, and the pipeline protects all of them"),
    ):
        forward(model)
