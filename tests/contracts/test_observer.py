"""Observers hear of every applied stage, and change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.tiny import FRAMES, PER_FRAME, TOKENS, generate, layout, logits, prompt, tiny_model

import tokenreduce as tr
from tokenreduce.hookspecs import hookimpl
from tokenreduce.plugins import manager
from tokenreduce.trace import StageTrace


class Recorder:
    def __init__(self) -> None:
        self.events: list[StageTrace] = []

    @hookimpl
    def tokenreduce_observe(self, event: StageTrace) -> None:
        self.events.append(event)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    manager().register(recorder, "observer:recorder")
    yield recorder
    manager().unregister(recorder)


@pytest.mark.parametrize("preset", ["framefusion", "fastv", "streaming_llm", "noncascaded_merge", "prune_then_merge"])
def test_events_are_the_stages_of_the_trace(recorder: Recorder, preset: str) -> None:
    model = tiny_model()
    with tr.reduce(model, preset, budget=0.8, layout=layout()) as run:
        logits(model)
        assert recorder.events == run.trace.stages
        count = len(recorder.events)
        assert count > 0
        generate(model, tokens=3)  # Its prefill once; decoding applies no stage.
        assert len(recorder.events) == 2 * count
    logits(model)
    assert len(recorder.events) == 2 * count


def test_events_count_tokens(recorder: Recorder) -> None:
    model = tiny_model()
    with tr.reduce(model, {"stages": [{"strategy": "random", "at": [1, 2], "keep": [0.5, 0.25]}]}, layout=layout()):
        logits(model, prompt(rows=2))
    vision = FRAMES * PER_FRAME
    text = TOKENS - vision
    for row in range(2):
        first, second = (event for event in recorder.events if event.row == row)
        assert (first.site, first.before, first.after) == ("layer[1].pre_attention", TOKENS, text + vision // 2)
        assert (second.site, second.before, second.after) == ("layer[2].pre_attention", first.after, text + vision // 4)
        for event in (first, second):
            assert event.strategy == "random"
            assert event.merged == 0
            assert event.dropped == event.before - event.after


def test_an_event_comes_right_after_its_stage(recorder: Recorder) -> None:
    """When layer 2 begins, the observers know of the stage before it and of none behind it."""
    model, known = tiny_model(), []
    handle = model.model.layers[2].register_forward_hook(lambda *_: known.append([e.layer for e in recorder.events]))
    pipeline = {"stages": [{"strategy": "random", "at": [1, 3], "keep": [0.5, 0.25]}]}
    with tr.reduce(model, pipeline, layout=layout()):
        handle.remove()
        known.clear()
        watch = model.model.layers[2].register_forward_hook(lambda *_: known.append([e.layer for e in recorder.events]))
        logits(model)
        watch.remove()
    assert known == [[1]]
    assert [event.layer for event in recorder.events] == [1, 3]


def test_observing_changes_no_bit(recorder: Recorder) -> None:
    model = tiny_model()
    with tr.reduce(model, "framefusion", budget=0.8, layout=layout()):
        watched = logits(model)
        manager().unregister(recorder)
        try:
            alone = logits(model)
        finally:
            manager().register(recorder, "observer:recorder")
    assert torch.equal(watched, alone)


def test_text_prompts_have_no_events(recorder: Recorder) -> None:
    model: Any = tiny_model()
    with tr.reduce(model, "random", budget=0.8, layout=tr.TokenLayout.text(1, TOKENS)):
        logits(model)
    assert recorder.events == []
