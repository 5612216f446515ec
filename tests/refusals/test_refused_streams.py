"""What a stream refuses, and that the model is as it was, also after a failure in the middle."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.decoders import decoder, embeddings
from support.streams import MERGE, TOKENS, VIDEO, near, part, pipeline, same_trace, states, whole
from support.subjects import SUBJECTS
from support.tiny import assert_same, snapshot

import tokenreduce as tr
from tokenreduce.errors import AttachError, LayoutError, PipelineError, PluginError, TokenReduceError, UnsupportedError

REFUSED = {
    "framefusion": ("framefusion", UnsupportedError, "a budget cannot be divided over a stream"),
    "fastv": (
        pipeline({"strategy": "fastv", "keep": 0.5}),
        UnsupportedError,
        "fastv cannot run in a stream: .*queries",
    ),
    "importance": (
        pipeline(MERGE, {"strategy": "importance_prune", "keep": 0.5}),
        UnsupportedError,
        "importance_prune",
    ),
    "random": (
        pipeline({"strategy": "random", "keep": 0.5}),
        UnsupportedError,
        "random .* among the tokens of the whole",
    ),
    "frames": (pipeline({"strategy": "uniform_frames", "keep": 0.5}), UnsupportedError, "uniform_frames"),
    "count": (pipeline(MERGE | {"threshold": None, "keep": 0.5}), UnsupportedError, "without `threshold`"),
    "stop_below": (pipeline(MERGE | {"stop_below": 0.1}), UnsupportedError, "write `stop_below: 0`"),
    "later": (pipeline(MERGE | {"at": 1}), UnsupportedError, r"it acts at layer\[1\].pre_attention"),
    "everywhere": (pipeline(MERGE | {"at": None}), UnsupportedError, "write `at: 0`"),
    "kv merge": (pipeline(MERGE | {"site": "kv"}), UnsupportedError, r"it acts at layer\[0\].kv"),
    "two": (pipeline(MERGE, MERGE), PipelineError, "one stage that merges before layer 0"),
    "span": (pipeline({"strategy": "streaming_window"}, budget={"tokens": 40}), UnsupportedError, "budget"),
    "nothing": (pipeline(), PipelineError, "no stage"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_runs(name: str) -> None:
    plan, kind, message = REFUSED[name]
    model = decoder(4, 32)
    before = snapshot(model)
    with pytest.raises(kind, match=message):
        tr.stream(model, plan)
    assert_same(model, before)


def test_refused_models() -> None:
    with pytest.raises(UnsupportedError, match="positions in several dimensions"):
        tr.stream(SUBJECTS["qwen2_vl"].model(), pipeline(MERGE))
    with pytest.raises(PipelineError, match="width must be at least 1"):
        tr.stream(decoder(), pipeline(MERGE), width=0)
    model = copy.deepcopy(decoder(2, 32, "granite"))
    model.model.embedding_multiplier = 2.0
    with tr.stream(model, pipeline(MERGE)) as stream:
        stream.feed(embeddings(VIDEO, 32, "mixed"), VIDEO)
        with pytest.raises(UnsupportedError, match="changes its embeddings before layer 0"):
            stream.finish()


def test_refused_chunks_are_not_taken() -> None:
    model, x = decoder(3, 32), embeddings(VIDEO, 32, "mixed")
    one, _, trace = whole(model, pipeline(MERGE), x, VIDEO)
    bad: list[tuple[Any, ...]] = [
        (x[:, :5].repeat(2, 1, 1),),
        (x[:, :5, :8],),
        (x[:, :5].float(),),
        (x[:, :4], part(VIDEO, 5, 10)),
        (x[:, 3:8], part(VIDEO, 3, 8)),
        (x[:, 43:48], replace(part(VIDEO, 43, 48), medium=torch.full((1, 5), 0), frame=torch.full((1, 5), 2))),
    ]
    with tr.stream(model, pipeline(MERGE), width=4) as stream, states(model) as seen:
        with pytest.raises(LayoutError, match="fed nothing"):
            stream.finish()
        stream.feed(x[:, :33], part(VIDEO, 0, 33))
        for chunk in bad:
            with pytest.raises(LayoutError):
                stream.feed(*chunk)
        with pytest.raises(LayoutError, match="marker is for"):
            stream.feed_frames(x[0, :10].view(2, 5, 32), marker=torch.zeros(4, dtype=torch.long))
        with pytest.raises(LayoutError, match="tokens per frame"):
            stream.feed_frames(x[0])
        stream.finish(x[:, 33:], part(VIDEO, 33, TOKENS))
        near(torch.cat(seen, 1), one)
        same_trace(trace, stream.trace)
        with pytest.raises(AttachError, match="is finished"):
            stream.feed(x[:, :1])


def test_protected_vision_is_refused() -> None:
    layout = replace(VIDEO, protected=VIDEO.vision)
    with tr.stream(decoder(3, 32), pipeline(MERGE)) as stream:
        stream.feed(embeddings(VIDEO, 32, "mixed"), layout)
        with pytest.raises(LayoutError, match="protects all vision tokens"):
            stream.finish()


def test_a_failed_forward_ends_the_stream_and_detaches_clean() -> None:
    model, x = decoder(3, 32), embeddings(VIDEO, 32, "noise")
    before = snapshot(model)

    def fail(module: Any, args: Any) -> None:
        raise RuntimeError("broken")

    with tr.stream(model, pipeline(MERGE), width=4) as stream:
        stream.feed(x[:, :2])
        handle = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="broken"):
            stream.feed(x[:, 2:], part(VIDEO, 2, TOKENS))
        handle.remove()
        with pytest.raises(AttachError, match="failed in a forward"):
            stream.finish()
    assert_same(model, before)
    with tr.stream(model, pipeline(MERGE), width=4) as stream:
        stream.feed(x, VIDEO)
        with pytest.raises(AttachError, match="attached to this model already"):
            tr.stream(model, pipeline(MERGE))
    assert_same(model, before)
    with pytest.raises(AttachError, match="was detached"):
        stream.finish()


def test_max_run_goes_with_a_threshold() -> None:
    with pytest.raises(TokenReduceError, match="`max_run` goes with `threshold`"):
        tr.load_pipeline(pipeline({"strategy": "similarity_merge", "keep": 0.5, "max_run": 4}))


def test_a_plugin_that_says_it_can_stream_and_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenreduce.plugins import strategies

    monkeypatch.setattr(strategies()["random"], "carry", lambda self, depth: None)
    with pytest.raises(PluginError, match="random says that it can run in a stream"):
        tr.stream(decoder(3, 32), pipeline({"strategy": "random", "keep": 0.5}))
