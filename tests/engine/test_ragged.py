"""Batches of videos of different length: no padding mask, no budget refused because of padding."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from support.matrix import BY_NAME, CASES, PROMPTS, check_prefill, known, model
from support.tiny import tiny_model
from transformers import DynamicCache

import tokenreduce as tr
from tokenreduce.engine.forward import state as engine
from tokenreduce.engine.model import tap
from tokenreduce.errors import BudgetError

CASCADED = [case.name for case in CASES if not case.name.startswith(("kv", "noncascaded", "streaming", "window"))]


@pytest.mark.parametrize("name", ["framefusion", "framefusion_equal", "fastv", "merge_late", "prune_window"])
def test_with_and_without_masks(name: str) -> None:
    """Row by row, and with the padding masks of transformers: both as the oracle says."""
    given, case, subject = PROMPTS["ragged"](), BY_NAME[name], model()
    assert name in CASCADED
    for masked in (False, True):
        seen: list[bool] = []
        real = tap.attend_by_row

        def counted(*arguments: object, real=real, seen=seen) -> object:  # type: ignore[no-untyped-def]
            seen.append(True)
            return real(*arguments)

        with (
            tr.reduce(subject, case.load(), layout=given.layout) as run,
            patch.object(engine, "attend_by_row", counted),
            patch.object(engine, "_plain", return_value=not masked),
            torch.no_grad(),
        ):
            out = subject(input_ids=given.ids, attention_mask=given.mask, position_ids=given.positions)
            trace = run.trace
        assert bool(seen) is not masked
        check_prefill(known(name, "ragged"), out.logits, trace, 1e-6)


def test_equal_counts_need_no_padding() -> None:
    """framefusion_equal leaves rows of one length equally long in every layer, whatever their videos show."""
    torch.manual_seed(0)
    layout = tr.TokenLayout.video(before=3, frames=8, per_frame=6, after=4)
    embeds = torch.randn(4, layout.shape[1], 32)
    embeds[1, 3:51] = embeds[1, 3:9].repeat(8, 1)  # one picture, all the time
    subject = tiny_model()
    embeds = torch.nn.functional.pad(embeds, (0, subject.config.hidden_size - 32))
    with tr.reduce(subject, "framefusion_equal", budget=0.5, layout=layout) as run, torch.no_grad():
        subject(inputs_embeds=embeds)
    assert all(len(set(layer.tokens.tolist())) == 1 for layer in run.trace.layers)
    with tr.reduce(subject, "framefusion", budget=0.5, layout=layout) as run, torch.no_grad():
        subject(inputs_embeds=embeds)
    assert any(len(set(layer.tokens.tolist())) > 1 for layer in run.trace.layers)


def test_padding_does_not_count_against_the_budget() -> None:
    """A short video beside a long one: its padding looks like text in the layout, which only the mask tells apart."""
    rows = [tr.TokenLayout.video(before=2, frames=frames, per_frame=6, after=2) for frames in (2, 16)]
    longest = rows[1].shape[1]
    padded = [
        torch.cat(
            [torch.cat([row.slot.new_full((1, longest - row.shape[1]), -1), getattr(row, name)], 1) for row in rows]
        )
        for name in ("slot", "frame")
    ]
    layout, subject = tr.TokenLayout(*padded), tiny_model()
    mask = torch.ones(2, longest, dtype=torch.long)
    mask[0, : longest - rows[0].shape[1]] = 0
    embeds = torch.randn(2, longest, subject.config.hidden_size)
    with tr.reduce(subject, "fastv", budget=0.8, layout=layout) as run, torch.no_grad():
        subject(inputs_embeds=embeds, attention_mask=mask)
    assert run.trace.relative_tokens[0] <= 0.8
    with (
        tr.reduce(subject, "fastv", budget=0.8, layout=layout),
        torch.no_grad(),
        pytest.raises(BudgetError, match="smallest feasible"),
    ):
        subject(inputs_embeds=embeds)  # no mask: now it is text


def test_layers_of_one_stage_share_a_mask() -> None:
    """Of a step of decoding, and of a later turn with padding; layers in which nothing happened have transformers' own."""
    given, subject = PROMPTS["ragged"](), model()
    made: list[int] = []
    real = tap.causal_mask

    def counted(*arguments: object) -> object:
        made.append(1)
        return real(*arguments)  # type: ignore[arg-type]

    rows, width = given.ids.shape
    mask = torch.cat([given.mask, torch.ones(rows, 4, dtype=torch.long)], 1)
    mask[0, width : width + 2] = 0  # the later turn is shorter in the first row
    text = torch.full((rows, 4), 5)
    with tr.reduce(subject, BY_NAME["fastv"].load(), layout=given.layout), torch.no_grad():
        cache = DynamicCache(config=subject.config)
        subject(input_ids=given.ids, attention_mask=given.mask, position_ids=given.positions, past_key_values=cache)
        assert [layer.reduced for layer in cache.layers] == [False, False, *[True] * (len(cache.layers) - 2)]
        assert len(cache.layers) > 3
        with patch.object(engine, "causal_mask", counted):
            subject(input_ids=text[:, :1], attention_mask=mask[:, : width + 1], past_key_values=cache)
            assert len(made) == 1
            cache.crop(-1)
            made.clear()
            subject(input_ids=text, attention_mask=mask, past_key_values=cache)
            assert len(made) == 1
            made.clear()
            subject(
                input_ids=text[:, :1],
                attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1),
                past_key_values=cache,
            )
            assert len(made) == 1
