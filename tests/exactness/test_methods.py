"""Published methods in batches, in later turns and in families: a row is reduced as it would be alone.

What they decide is held to recordings of their public code in tests/strategies/zoo; here it is that the engine asks them one
sequence at a time and that nothing of a neighbour, of padding or of a family gets in.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.matrix import FAMILIES, METHODS, TOWER_METHODS, Case, Prompt, model, near, prompt

import tokenreduce as tr
from tokenreduce.errors import UnsupportedError

NAMES = [case.name for case in METHODS]
METHOD = {case.name: case for case in METHODS}
TOLERANCE = 1e-6


def gridded(given: Prompt) -> Prompt:
    """The prompt with rows and columns: frames of 2 × 3."""
    slot = given.layout.slot
    row, column = (torch.where(slot >= 0, axis, -1) for axis in (slot // 3, slot % 3))
    return replace(given, layout=replace(given.layout, row=row, column=column))


def alone(given: Prompt, number: int) -> Prompt:
    """One row of the prompt without its padding."""
    _, columns = given.row(number)
    layout = tr.TokenLayout(
        **{
            name: value[number : number + 1, columns]
            for name in ("slot", "frame", "medium", "marker", "protected", "row", "column")
            if (value := getattr(given.layout, name)) is not None
        }
    )
    pick = slice(number, number + 1)
    return Prompt(given.ids[pick, columns], given.mask[pick, columns], given.positions[pick, columns], layout)


def answered(subject: Any, case: Case, given: Prompt) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Trace of the prefill, logits of four generated tokens, logits of a second turn of three tokens."""
    with torch.no_grad(), tr.reduce(subject, case.load(), layout=given.layout) as run:
        out = subject.generate(
            **given.inputs,
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        trace = run.trace
        more = torch.arange(2, 5).expand(len(given.ids), 3)
        mask = torch.cat([given.mask, given.mask.new_ones(len(given.ids), 3 + 3)], 1)
        second = subject(
            input_ids=torch.cat([out.sequences[:, -1:], more[:, 1:]], 1),
            attention_mask=mask,
            position_ids=mask.cumsum(1)[:, -3:] - 1,
            past_key_values=out.past_key_values,
        )
    return trace, torch.stack(out.logits, 1), second.logits


def check(name: str, family: str) -> None:
    case, subject = METHOD[name], model(family)
    rows = ([3, range(14, 20), 5], [4, range(7), 6], [2, range(3, 9), 4, range(20, 25), 3])
    whole = gridded(prompt(*rows, markers=name not in ("sttm",)))
    trace, logits, second = answered(subject, case, whole)
    reduced = False
    for number in range(len(rows)):
        own = alone(whole, number)
        its, its_logits, its_second = answered(subject, case, own)
        shift = whole.ids.shape[1] - own.ids.shape[1]
        assert (trace.kept[number] - shift).tolist() == its.kept[0].tolist(), f"row {number}"
        near(logits[number], its_logits[0], TOLERANCE)
        near(second[number], its_second[0], TOLERANCE)
        held = [int(layer.tokens[0]) for layer in its.layers]
        assert [int(layer.tokens[number]) for layer in trace.layers] == held
        reduced |= min(held) < own.ids.shape[1]
    assert reduced


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_rows_alone(name: str) -> None:
    check(name, "qwen2")


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"qwen2"}))
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_rows_alone_in_every_family(name: str, family: str) -> None:
    check(name, family)


@pytest.mark.parametrize("name", TOWER_METHODS)
def test_a_method_that_reads_a_tower_is_refused_where_there_is_none(name: str) -> None:
    given, subject = gridded(prompt([3, range(14, 20), 5])), model()
    with pytest.raises(UnsupportedError, match=r"tower\.mean"), tr.reduce(subject, name, layout=given.layout):
        subject(**given.inputs)
