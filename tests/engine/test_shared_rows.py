"""Importance from the log-sum-exps that attention has computed: the same bits of output, the same importance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny import BEFORE, FRAMES, PER_FRAME, forward, layout, prompt, tiny_model
from test_later_turns import FIRST, turns
from torch import Tensor

import tokenreduce as tr
import tokenreduce.engine.forward.importance as reading_module
import tokenreduce.engine.forward.state as forward_module

PIPELINES: dict[str, Any] = {
    "all": {"name": "a", "stages": [{"strategy": "importance_prune", "at": 1, "keep": 0.5}]},
    "window": {
        "name": "w", "stages": [{"strategy": "importance_prune", "at": 1, "keep": 0.5, "importance": "window", "window": 7}],
    },
    "max": {"name": "m", "stages": [{"strategy": "importance_prune", "at": [0, 2], "keep": [0.8, 0.5], "heads": "max"}]},
    "last": {"name": "l", "stages": [{"strategy": "fastv", "at": 2, "keep": 0.5}]},
    "after a merge": {
        "name": "f",
        "stages": [
            {"strategy": "similarity_merge", "at": 0, "keep": 0.7},
            {"strategy": "importance_prune", "at": 2, "keep": 0.5},
        ],
    },
}  # fmt: skip


class Spy:
    """Compares what `importance` gives with what it gives without log-sum-exps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tolerance: float) -> None:
        self.shared: list[bool] = []
        plain = reading_module.importance

        def importance(
            q: Tensor, k: Tensor, scale: float, queries: int, heads: str, lse: Tensor | None = None
        ) -> Tensor:
            scores = plain(q, k, scale, queries, heads, lse)
            self.shared.append(lse is not None)
            torch.testing.assert_close(scores, plain(q, k, scale, queries, heads), atol=tolerance, rtol=0)
            return scores

        monkeypatch.setattr(reading_module, "importance", importance)


def outcome(pipeline: Any, attention: str = "sdpa", rows: int = 2) -> tuple[Tensor, Tensor]:
    """Logits, and where each token went."""
    model = tiny_model(attention)
    with tr.reduce(model, pipeline, layout=layout().expand(rows)) as run:
        return forward(model, ids=prompt(2, rows=rows), use_cache=False), run.trace.source


@pytest.mark.parametrize("name", PIPELINES)
def test_sharing_changes_no_bit_of_the_output(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch, 1e-5)
    logits, source = outcome(PIPELINES[name])
    assert spy.shared
    assert all(spy.shared)
    monkeypatch.setattr(reading_module.RowSums, "around", lambda _, base: base)
    spy.shared.clear()
    plain, where = outcome(PIPELINES[name])
    assert spy.shared
    assert not any(spy.shared)
    assert torch.equal(source, where)
    assert torch.equal(logits, plain)


def test_a_stage_that_keeps_all_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch, 1e-5)
    everything = {"name": "k", "stages": [{"strategy": "importance_prune", "at": 1, "keep": 1.0}]}
    logits, _ = outcome(everything)
    assert spy.shared == [True, True]
    assert torch.equal(logits, forward(tiny_model(), ids=prompt(2, rows=2), use_cache=False))


def test_rows_that_attend_one_by_one_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a merge that left rows of a batch unequally long, they attend without a mask."""
    spy = Spy(monkeypatch, 1e-5)
    merge = {"strategy": "similarity_merge", "at": 0, "site": "pre_attention", "threshold": 0.9}
    prune = {"strategy": "importance_prune", "at": 2, "keep": 0.5}
    ids = prompt(2, rows=2)
    ids[1, BEFORE : BEFORE + FRAMES * PER_FRAME] = ids[1, BEFORE]
    model, lengths = tiny_model(), []
    real = forward_module.attend_by_row
    monkeypatch.setattr(forward_module, "attend_by_row", lambda *given: lengths.append(given[5]) or real(*given))
    with tr.reduce(model, {"name": "r", "stages": [merge, prune]}, layout=layout().expand(2)) as run:
        ours = forward(model, ids=ids, use_cache=False)
        assert run.trace.layers[2].tokens.unique().numel() == 2
    assert lengths
    assert spy.shared == [True, True]
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        tr.reduce(model, {"name": "r", "stages": [merge, prune]}, layout=layout().expand(2)),
    ):
        theirs = forward(model, ids=ids, use_cache=False)
    assert spy.shared == [True, True, False, False]
    torch.testing.assert_close(ours[:, -1], theirs[:, -1], atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", PIPELINES)
def test_ragged_turns_share(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding masks, and keys of an earlier turn."""
    spy = Spy(monkeypatch, 1e-12)
    model = tiny_model().double()
    with tr.reduce(model, PIPELINES[name], layout=tr.TokenLayout.text(1, FIRST)) as run:
        turns(model, slice(0, 2), run)
    assert spy.shared
    assert all(spy.shared)


def test_inference_mode_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """There PyTorch hands attention over as one piece."""
    spy = Spy(monkeypatch, 1e-5)
    with torch.inference_mode():
        inside, _ = outcome(PIPELINES["all"])
    assert spy.shared == [True, True]
    assert torch.equal(inside, outcome(PIPELINES["all"])[0])


def test_kernels_that_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention and SDPA's mathematical kernel: the rows are computed again, and the choice is the same."""
    spy = Spy(monkeypatch, 1e-5)
    shared, source = outcome(PIPELINES["all"])
    eager, from_eager = outcome(PIPELINES["all"], "eager")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain, from_plain = outcome(PIPELINES["all"])
    assert spy.shared == [True] * 2 + [False] * 4
    assert torch.equal(source, from_eager)
    assert torch.equal(source, from_plain)
    for logits in (eager, plain):
        torch.testing.assert_close(logits, shared, atol=5e-5, rtol=0)
