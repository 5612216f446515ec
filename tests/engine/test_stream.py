"""A stream is the prefill of the whole, chunk by chunk: same tokens, same states, same cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.decoders import KINDS, decoder, embeddings
from support.rows import rows
from support.streams import (
    MANY,
    MERGE,
    SOME,
    TOKENS,
    VIDEO,
    WINDOW,
    fed,
    layout_of,
    near,
    pipeline,
    same_trace,
    states,
    whole,
)
from support.subjects import SUBJECTS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tokenreduce as tr
from tokenreduce.errors import AttachError
from tokenreduce.layout import NEWLINE


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    """A pipeline that can be streamed."""
    stages: list[dict[str, Any]] = []
    if draw(st.integers(0, 3)):
        merge = MERGE | {"threshold": draw(st.sampled_from([-1.0, 0.3, 0.6, 0.95]))}
        merge |= draw(st.sampled_from([{}, {"stop_below": 0.5, "merge_below": True}, {"max_run": 2}, {"max_run": 3}]))
        stages.append(merge)
    if not stages or draw(st.booleans()):
        stages.append(WINDOW | draw(st.sampled_from([{}, {"from": 1}, {"at": [0, 2]}, {"sinks": 0}, {"window": 1}])))
    policy = st.sampled_from(["merge", "protect"])
    return pipeline(*stages, newlines=draw(policy), wrappers=draw(policy))


def check_stream(row: Any, kind: str, plan: Any, look: tuple[str, int], data: st.DataObject) -> None:
    layout = layout_of(row)
    if not bool(layout.reducible(plan["newlines"], plan["wrappers"]).any()):
        return
    model, x = decoder(3, 32, look[0]), embeddings(layout, 32, kind)
    one, cache, trace = whole(model, plan, x, layout)
    borders = sorted(data.draw(st.lists(st.integers(0, x.shape[1]), max_size=6)))
    with tr.stream(model, plan, width=look[1]) as stream, states(model) as seen:
        with FlopCounterMode(display=False) as counter:
            out = fed(stream, x, layout, borders)
        assert out.past_key_values is stream.cache
        near(torch.cat(seen, 1), one)
        same_trace(trace, stream.trace)
        assert stream.trace.flops == counter.get_total_flops()
        assert (stream.seen, stream.waiting) == (x.shape[1], 0)
        for ours, theirs in zip(stream.cache.layers, cache.layers, strict=True):
            assert ours.get_seq_length() == theirs.get_seq_length() == x.shape[1]
            near(ours.keys, theirs.keys)
            near(ours.values, theirs.values)


LOOKS = st.tuples(st.sampled_from(["qwen2", "qwen3", "llama"]), st.sampled_from([1, 3, 8, 1000]))


@given(rows(), st.sampled_from(KINDS), plans(), LOOKS, st.data())
@SOME
def test_stream_is_the_whole(row: Any, kind: str, plan: Any, look: tuple[str, int], data: st.DataObject) -> None:
    check_stream(row, kind, plan, look, data)


@pytest.mark.slow
@given(rows(), st.sampled_from(KINDS), plans(), LOOKS, st.data())
@MANY
def test_stream_is_the_whole_many_times(
    row: Any, kind: str, plan: Any, look: tuple[str, int], data: st.DataObject
) -> None:
    check_stream(row, kind, plan, look, data)


def test_a_window_that_slides_past_all_it_held() -> None:
    """All frames merge into the first; then the window ends behind it, and the layer, empty, counts on."""
    layout = tr.TokenLayout.video(before=0, frames=6, per_frame=4, after=3)
    plan = pipeline(MERGE | {"threshold": -1.0, "stop_below": 0.0}, WINDOW | {"sinks": 0, "window": 9})
    model, x = decoder(3, 32, "qwen2"), embeddings(layout, 32, "static")
    one, _, trace = whole(model, plan, x, layout)
    with tr.stream(model, plan, width=1) as stream, states(model) as seen:
        with FlopCounterMode(display=False) as counter:
            fed(stream, x, layout, [])
        near(torch.cat(seen, 1), one)
        same_trace(trace, stream.trace)
        assert stream.trace.flops == counter.get_total_flops()
        assert all(layer.position is not None and int(layer.position[0, -1]) == 26 for layer in stream.cache.layers)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["qwen2", "mistral", "phi3", "gemma3_text", "olmo2"])
def test_families_and_kernels_in_float32(family: str, attention: str) -> None:
    model, x = decoder(4, 32, family, attention, torch.float32), embeddings(VIDEO, 32, "mixed", dtype=torch.float32)
    plan = pipeline(MERGE | {"max_run": 4})
    one, _, trace = whole(model, plan, x, VIDEO)
    with tr.stream(model, plan, width=6) as stream, states(model) as seen:
        fed(stream, x, VIDEO, [2, 9, 10, 26, 40])
        near(torch.cat(seen, 1), one, 5e-5)
        same_trace(trace, stream.trace)
    assert len(trace.kept[0]) < TOKENS


@pytest.mark.parametrize("plan", [pipeline(MERGE), pipeline(MERGE, WINDOW | {"from": 1})], ids=["merge", "window"])
def test_what_follows_a_stream(plan: Any) -> None:
    """A turn of text and eight generated tokens on its cache are those on the cache of the whole; so is a video turn."""
    model, x = decoder(4, 32, "qwen2", "sdpa"), embeddings(VIDEO, 32, "mixed")
    question = torch.tensor([[5, 6, 7]])
    ids = torch.cat([torch.zeros(1, TOKENS + 3, dtype=torch.long), torch.tensor([[9, 11]])], 1)

    def follow(run: Any, cache: Any) -> list[Tensor]:
        turn = model(input_ids=question, past_key_values=cache).logits
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=8, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        run.layout = VIDEO
        video = model(inputs_embeds=x, past_key_values=cache).logits
        return [turn, made.sequences.double(), torch.stack(made.logits), video]

    with torch.no_grad():
        with tr.reduce(model, plan, layout=VIDEO) as run:
            theirs = follow(run, model(inputs_embeds=x, use_cache=True).past_key_values)
        with tr.stream(model, plan, width=5) as stream:
            fed(stream, x, VIDEO, [7, 8, 31])
            for ours, other in zip(follow(stream, stream.cache), theirs, strict=True):
                near(ours, other)


def test_llava_video_frames_encoded_chunk_by_chunk() -> None:
    family = SUBJECTS["llava_video"]
    model = family.model(torch.float64)
    frames = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(3)).double()
    frames = frames + 0.5 * torch.randn(7, 3, 24, 24, generator=torch.Generator().manual_seed(4)).double().cumsum(0)
    before, after = torch.tensor([[3, 4, 5]]), torch.tensor([[6, 7]])
    per_frame = model.config.tokens_per_frame
    marker = torch.where(torch.arange(per_frame) % (model.config.rows + 1) == model.config.rows, NEWLINE, 0)
    placeholders = torch.full((1, 7 * per_frame), model.config.video_token_id)
    for newlines in ("merge", "protect"):
        plan = pipeline(MERGE | {"threshold": 0.8, "max_run": 5}, newlines=newlines)
        with torch.no_grad(), tr.reduce(model, plan) as run:
            one = model(input_ids=torch.cat([before, placeholders, after], 1), pixel_values_videos=frames[None])
            trace = run.trace
        with torch.no_grad(), tr.stream(model, plan, width=16) as stream:
            stream.feed_text(before)
            for clip in frames.split(2):
                features = model.get_video_features(clip[None]).pooler_output
                stream.feed_frames(features.view(len(clip), per_frame, -1), marker=marker)
            stream.feed_text(after)
            out = stream.finish(logits_to_keep=1)
            same_trace(trace, stream.trace)
            assert stream.trace.head_tokens == 1
            near(out.logits[:, -1], one.logits[:, -1])
            answer = model(input_ids=after, past_key_values=stream.cache).logits
        assert trace.stages[0].merged > per_frame
        with torch.no_grad(), tr.reduce(model, plan):
            near(answer, model(input_ids=after, past_key_values=one.past_key_values).logits)


def test_two_videos_by_frames() -> None:
    model = decoder(3, 32)
    layout = tr.TokenLayout(
        slot=torch.cat([VIDEO.slot, VIDEO.slot], 1),
        frame=torch.cat([VIDEO.frame, VIDEO.frame], 1),
        medium=torch.cat([VIDEO.media(), torch.where(VIDEO.vision, 1, -1)], 1),
    )
    x = embeddings(layout, 32, "static")
    one, _, trace = whole(model, pipeline(MERGE), x, layout)
    with tr.stream(model, pipeline(MERGE)) as stream, states(model) as seen:
        for start in (0, TOKENS):
            stream.feed(x[:, start : start + 3])
            frames = x[0, start + 3 : start + 48].view(9, 5, 32)
            stream.feed_frames(frames[:4], new=start > 0)
            stream.feed_frames(frames[4:])
            stream.feed(x[:, start + 48 : start + TOKENS])
        stream.finish()
        near(torch.cat(seen, 1), one)
        same_trace(trace, stream.trace)
    assert len(trace.kept[0]) == 24


def test_text_alone_is_dense() -> None:
    model, x = decoder(3, 32), embeddings(tr.TokenLayout.text(1, 20), 32, "noise")
    with tr.stream(model, pipeline(MERGE, WINDOW | {"window": 2}), width=6) as stream, states(model) as seen:
        stream.feed(x[:, :15])
        assert stream.waiting == 15
        with pytest.warns(DeprecationWarning, match=r"Stream.held is deprecated: read Stream.waiting"):
            assert stream.held == 15
        stream.finish(x[:, 15:])
        with pytest.raises(AttachError, match="no forward with vision tokens has run"):
            _ = stream.trace
    with torch.no_grad():
        near(torch.cat(seen, 1), model.model(inputs_embeds=x).last_hidden_state)


def test_max_run_bounds_what_is_held() -> None:
    """A slot that never changes keeps its run open: without max_run everything behind it waits."""
    model, frames = decoder(1, 32), 60
    layout = tr.TokenLayout.video(before=2, frames=frames, per_frame=5, after=0)
    moving, still = embeddings(layout, 32, "noise"), embeddings(layout, 32, "static")
    x = torch.where((layout.slot == 0)[..., None], still, moving)
    most = {}
    for max_run in (None, 4):
        with tr.stream(model, pipeline(MERGE | ({"max_run": max_run} if max_run else {})), width=3) as stream:
            stream.feed(x[:, :2])
            held = []
            for frame in x[0, 2:].split(5):
                stream.feed_frames(frame[None])
                held.append(stream.waiting)
            stream.finish()
            most[max_run] = max(held)
            assert len(stream.trace.kept[0]) == 2 + 4 * frames + (frames // max_run if max_run else 1)
    assert most[4] <= 4 * 5 + 3
    assert most[None] >= 4 * frames + 1
