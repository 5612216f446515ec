"""`attach` and `detach`, the deprecated names: they warn, and do what they did."""

from __future__ import annotations

import pytest
import torch
from support.tiny import SHARE, assert_same, hooks, layout, logits, snapshot, tiny_model

import tokenreduce as tr
from tokenreduce.errors import AttachError, BudgetError


def test_attach_warns_and_is_reduce() -> None:
    model = tiny_model()
    before = snapshot(model)
    with tr.reduce(model, "fastv", budget=SHARE, layout=layout()):
        expected = logits(model)
    with pytest.warns(DeprecationWarning, match=r"tokenreduce.attach is deprecated: call tokenreduce.reduce") as warned:
        run = tr.attach(model, "fastv", budget=SHARE, layout=layout())
    assert warned[0].filename == __file__
    assert torch.equal(logits(model), expected)
    run.detach()
    assert_same(model, before)
    with pytest.warns(DeprecationWarning, match="tokenreduce.attach"), pytest.raises(BudgetError):
        tr.attach(model, "fastv", budget=0.01, layout=layout())
    assert_same(model, before)


def test_what_nobody_kept_is_taken_off_by_detach() -> None:
    model = tiny_model()
    before, dense = snapshot(model), logits(model)
    with pytest.warns(DeprecationWarning, match=r"tokenreduce.attach") as warned:
        tr.attach(model, "random", budget=SHARE, layout=layout())
    assert len(warned) == 1  # It may be let go of.
    assert not torch.equal(logits(model), dense)
    with pytest.warns(
        DeprecationWarning, match=r"tokenreduce.detach is deprecated: keep what tokenreduce.reduce returns"
    ):
        tr.detach(model)
    assert_same(model, before)
    with (
        pytest.warns(DeprecationWarning, match="tokenreduce.detach"),
        pytest.raises(AttachError, match="no pipeline is attached to this Qwen2ForCausalLM"),
    ):
        tr.detach(model)
    assert hooks(model) == 0
