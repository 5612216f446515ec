"""A call has its trace: dense ones say so, an evaluation finds all of them, and what did nothing is named."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.decoders import decoder, embeddings, tokens_of

import tokenreduce as tr
from tokenreduce.engine.run import TRACES
from tokenreduce.errors import PipelineError, TokenReduceError

LAYOUT = tr.TokenLayout.video(before=2, frames=8, per_frame=5, after=2)
FASTV = {"strategy": "fastv", "at": 2, "keep": 0.5}


def stages(*stages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"name": "tried", "stages": list(stages), **fields}


@torch.no_grad()
def prefill(kind: str = "mixed") -> None:
    decoder()(inputs_embeds=embeddings(LAYOUT, 32, kind), logits_to_keep=1)


@torch.no_grad()
def text(run: tr.Run, words: int = 6, rows: int = 1) -> None:
    run.layout = tr.TokenLayout.text(rows, words)
    mask = torch.ones(rows, words, dtype=torch.long)
    mask[0, 0] = 0
    decoder()(input_ids=torch.arange(3, 3 + words).expand(rows, -1), attention_mask=mask, logits_to_keep=2)
    run.layout = LAYOUT


def text_then_fail(run: tr.Run) -> None:
    text(run)
    raise ZeroDivisionError


def test_a_call_without_vision_tokens_has_a_trace_that_says_dense() -> None:
    with tr.reduce(decoder(), stages(FASTV), layout=LAYOUT) as run:
        prefill()
        video = run.trace
        text(run, rows=2)
        dense = run.trace
    assert not video.dense
    assert video.reduced
    assert "dense (no vision tokens in this call)" in str(dense)
    assert tokens_of(dense) == [[5] * 4, [6] * 4]
    assert dense.relative_tokens == [1.0, 1.0]
    assert dense.relative_flops == 1.0
    assert dense.head_tokens == 2
    assert dense.source.tolist() == [[-1, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert [row.tolist() for row in dense.kept] == [[1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]


def test_traces_hold_every_call_of_an_evaluation_and_little_of_each() -> None:
    with tr.reduce(decoder(), stages(FASTV), layout=LAYOUT) as run:
        for words in (None, 6, None, 7):
            prefill() if words is None else text(run, words)
        assert [bool(trace.dense) for trace in run.traces] == [False, True, False, True]
        assert [trace.tokens.tolist() for trace in run.traces] == [[44], [5], [44], [6]]
        assert [trace.head_tokens for trace in run.traces] == [1, 2, 1, 2]
        assert all(trace.kept == [] and trace.source.numel() == 0 for trace in run.traces)
        assert run.traces[0].flops == run.traces[2].flops
        assert run._traces.maxlen == TRACES
        full = run.trace
    assert len(full.kept) == 1
    assert full.relative_tokens == run.traces[-1].relative_tokens


def test_stages_and_sites_that_did_nothing_are_named() -> None:
    three = stages(FASTV | {"at": [1, 2, 3]}, {"strategy": "random", "at": 3, "keep": 0.9})
    with tr.reduce(decoder(), three, layout=LAYOUT) as run:
        prefill()
    assert run.trace.idle == [
        "stage 1, fastv, did nothing at layer[2].pre_attention, layer[3].pre_attention: it left all tokens it saw there",
        "stage 2, random, did nothing: it left all 24 tokens it saw",
    ]
    assert all(line in str(run.trace) for line in run.trace.idle)


def test_a_budget_that_is_used_up_leaves_the_next_stage_idle() -> None:
    with tr.reduce(decoder(), stages({"strategy": "random"}, {"strategy": "fastv"}), layout=LAYOUT, budget=0.5) as run:
        prefill()
    assert run.trace.idle == ["stage 2, fastv, did nothing: it left all 22 tokens it saw"]


def test_the_end_of_the_block_warns_where_nothing_was_reduced() -> None:
    with (
        pytest.warns(UserWarning, match="tried reduced nothing: none of its 1 calls had vision tokens"),
        tr.reduce(decoder(), stages(FASTV), layout=LAYOUT) as run,
    ):
        text(run)
    with (
        pytest.warns(
            UserWarning, match="tried reduced nothing: 1 calls with vision tokens kept them all; stage 1, fastv"
        ),
        tr.reduce(decoder(), stages(FASTV | {"keep": 1.0}), layout=LAYOUT),
    ):
        prefill()


def test_it_does_not_warn_where_something_was_or_nothing_ran_or_all_was_asked_for() -> None:
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("error", UserWarning)
        with tr.reduce(decoder(), stages(FASTV), layout=LAYOUT) as run:
            text(run)
            prefill()
        with tr.reduce(decoder(), stages(FASTV), layout=LAYOUT):
            pass
        with tr.reduce(decoder(), stages({"strategy": "random"}), layout=LAYOUT, budget=1):
            prefill()
        with pytest.raises(ZeroDivisionError), tr.reduce(decoder(), stages(FASTV), layout=LAYOUT) as run:
            text_then_fail(run)


def test_a_trace_is_saved_plotted_and_put_into_rows(tmp_path: Path) -> None:
    with tr.reduce(decoder(), stages(FASTV), layout=LAYOUT) as run:
        prefill()
    path = run.trace.save(tmp_path / "trace.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    assert [layer["tokens"] for layer in data["layers"]] == [[44], [44], [24], [24]]
    with pytest.raises(TokenReduceError, match="exists; give another path"):
        run.trace.save(path)
    run.trace.save(path, force=True)
    rows = run.trace.rows()
    assert [(row["layer"], row["row"], row["tokens"]) for row in rows] == [
        (0, 0, 44),
        (1, 0, 44),
        (2, 0, 24),
        (3, 0, 24),
    ]
    line = run.trace.plot(tmp_path / "trace.png").axes[0].lines[0]
    assert line.get_ydata().tolist() == [44, 44, 24, 24]
    assert (tmp_path / "trace.png").stat().st_size > 1000


def test_a_notebook_shows_what_there_is() -> None:
    with tr.reduce(decoder(), stages(FASTV, description="a <b>"), layout=LAYOUT) as run:
        prefill()
        assert repr(run) == "<Run of pipeline tried: attached; detach() takes it off>"
        assert repr(run.pipeline) == "<Pipeline tried, budget none: fastv (keep: 0.5)>"
        html = run._repr_html_()
    assert repr(run.trace).startswith("<Trace of pipeline tried, budget none: 0.7727 of the tokens")
    assert "a &lt;b&gt;" in html
    assert "<td>layer[2].pre_attention</td>" in html
    assert html.count("<table>") == html.count("</table>") == 3


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"strategy": "fastv", "at": 0, "keep": 0.5}, "pipeline tried: fastv reads attention"),
        ({"strategy": "random", "at": 9, "keep": 0.5}, "pipeline tried: random acts at layer 9"),
        ({"strategy": "fastv", "at": [1, 2], "keep": [0.5]}, "pipeline tried: fastv: `keep` has 1"),
        ({"strategy": "fastv"}, "pipeline tried: fastv solves its count from a budget"),
    ],
)
def test_a_refusal_names_pipeline_and_stage(stage: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError) as error, tr.reduce(decoder(), stages(stage), layout=LAYOUT):
        prefill()
    assert str(error.value).startswith(message)
