"""A stream is the prefill of the whole, chunk by chunk: same tokens, same states, same cache."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from decoders import KINDS, decoder, embeddings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_properties import rows
from test_turns_vision import SUBJECTS
from tiny import assert_same, snapshot
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tokenreduce as tr
from tokenreduce.errors import AttachError, LayoutError, PipelineError, TokenReduceError, UnsupportedError
from tokenreduce.layout import NEWLINE
from tokenreduce.ops.carry import Carry

CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large]
SOME = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=CHECKS)
MANY = settings(max_examples=2000, deadline=None, suppress_health_check=CHECKS)
EXACT = 1e-6
MERGE = {"strategy": "similarity_merge", "threshold": 0.6, "at": 0, "stop_below": 0.0}
WINDOW = {"strategy": "streaming_window", "sinks": 2, "window": 9}
VIDEO = tr.TokenLayout.video(before=3, frames=9, per_frame=5, after=4)
TOKENS = VIDEO.shape[1]


def pipeline(*stages: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"name": "streamed", "stages": list(stages), **rest}


def layout_of(row: Any) -> tr.TokenLayout:
    """The layout of a row of `test_properties.rows`."""
    slot, frame, medium, marker, protected = (column[None] for column in torch.tensor(row).unbind(-1))
    return tr.TokenLayout(slot=slot, frame=frame, medium=medium, marker=marker, protected=protected.bool())


def part(layout: tr.TokenLayout, start: int, stop: int) -> tr.TokenLayout:
    """Some of the tokens of a layout."""
    given = {name: value[:, start:stop] for name, value in vars(layout).items() if value is not None}
    return replace(layout, **given)


@contextmanager
def states(model: Any) -> Iterator[list[Tensor]]:
    """What the decoder's last norm gives, forward by forward."""
    seen: list[Tensor] = []
    handle = model.model.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    yield seen
    handle.remove()


def whole(model: Any, plan: Any, x: Tensor, layout: tr.TokenLayout) -> tuple[Tensor, Any, Any]:
    """Last hidden states, cache and trace of the prefill of the whole."""
    with torch.no_grad(), tr.reduce(model, plan, layout=layout) as run, states(model) as seen:
        out = model(inputs_embeds=x, use_cache=True)
        return torch.cat(seen, 1), out.past_key_values, run.trace


def fed(stream: tr.Stream, x: Tensor, layout: tr.TokenLayout, borders: list[int]) -> Any:
    """The output of the stream of x, cut at `borders`."""
    cuts = [0, *borders, x.shape[1]]
    for start, stop in itertools.pairwise(cuts[:-1]):
        stream.feed(x[:, start:stop], part(layout, start, stop))
    return stream.finish(x[:, cuts[-2] :], part(layout, cuts[-2], cuts[-1]))


def same_trace(one: Any, other: Any) -> None:
    assert torch.equal(one.kept[0], other.kept[0])
    assert torch.equal(one.source, other.source)
    assert one.stages == other.stages
    assert [layer.tokens.tolist() for layer in one.layers] == [layer.tokens.tolist() for layer in other.layers]
    assert (one.kv_bytes, one.dense_flops, one.relative_tokens) == (
        other.kv_bytes, other.dense_flops, other.relative_tokens,
    )  # fmt: skip


def near(ours: Tensor, theirs: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


# The carry -----------------------------------------------------------------------------------------------------------


def brute_force(
    x: Tensor, layout: tr.TokenLayout, able: list[bool], threshold: float, max_run: int | None
) -> tuple[list[int], dict[int, Tensor]]:
    """The token that each token ends in, and the mean of each group."""
    slot, frame, medium = (facts[0].tolist() for facts in (layout.slot, layout.frame, layout.media()))
    into: list[int] = []
    for i in range(len(x)):
        before = [j for j in range(i) if able[j] and (slot[j], medium[j]) == (slot[i], medium[i])]
        j = before[-1] if able[i] and before else -1
        alike = j >= 0 and bool(x[i].any()) and bool(x[j].any())
        alike = alike and float(torch.cosine_similarity(x[i], x[j], dim=0)) >= threshold
        if alike and max_run is not None:
            alike = frame[i] // max_run == frame[j] // max_run
        into.append(into[j] if alike else i)
    groups = {head: [i for i in range(len(x)) if into[i] == head] for head in set(into)}
    return into, {head: x[members].mean(0) for head, members in groups.items()}


@given(
    rows(), st.sampled_from(KINDS), st.sampled_from([-1.0, 0.3, 0.6, 0.95]), st.sampled_from([None, 2, 3]), st.data()
)
@settings(SOME, max_examples=100)
def test_carry_against_loops(row: Any, kind: str, threshold: float, max_run: int | None, data: st.DataObject) -> None:
    layout = layout_of(row)
    n = layout.shape[1]
    x, able = embeddings(layout, 8, kind)[0], layout.reducible()[0]
    into, means = brute_force(x, layout, able.tolist(), threshold, max_run)
    carry, source, out = Carry(threshold, max_run), [], []
    borders = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))
    for start, stop in zip([0, *borders], [*borders, n], strict=True):
        facts = (layout.slot, layout.frame, layout.media())
        source += carry.feed(x[start:stop], *(f[0, start:stop] for f in facts), able[start:stop]).tolist()
        # What waits: no token before the first one whose group is not whole yet, and may be joined.
        assert carry.held - carry.closed <= sum(head < stop for head in means)
        out.append(carry.take(data.draw(st.integers(0, carry.closed))))
    with pytest.raises(ValueError, match="are closed"):
        carry.take(carry.held + 1)
    carry.close()
    out.append(carry.take(carry.held))
    state, position, size = (torch.cat(parts) for parts in zip(*out, strict=True))
    assert source == into
    assert position.tolist() == sorted(means)
    assert size.tolist() == [into.count(head) for head in sorted(means)]
    near(state, torch.stack([means[head] for head in sorted(means)]), 1e-12)
    assert (carry.seen, carry.similar) == (n, n - len(means))


def test_carried_means_are_those_of_the_whole_bit_for_bit() -> None:
    """Also of large rows in bfloat16 and float32, over more tokens than either can count exactly in halves."""
    for dtype, scale in ((torch.bfloat16, 1e38), (torch.float32, 3e38), (torch.float32, 1e-30)):
        x = (1 + 0.2 * torch.rand(700, 4, generator=torch.Generator().manual_seed(1))).mul(scale / 2).to(dtype)
        slot, frame = torch.zeros(700, dtype=torch.long), torch.arange(700)
        merged = tr.Reduction.merge(torch.zeros(1, 700, dtype=torch.long))
        one = merged.apply(x[None], torch.ones(1, 700, dtype=torch.long))
        carry = Carry(0.9)
        for start in range(0, 700, 33):
            some = slice(start, start + 33)
            carry.feed(x[some], slot[some], frame[some], slot[some], torch.ones(len(x[some]), dtype=torch.bool))
        carry.close()
        state, _, size = carry.take(1)
        assert size.tolist() == [700]
        assert one.hidden is not None
        assert torch.equal(state, one.hidden[0])


# The whole stream -----------------------------------------------------------------------------------------------------


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
        assert (stream.seen, stream.held) == (x.shape[1], 0)
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
                held.append(stream.held)
            stream.finish()
            most[max_run] = max(held)
            assert len(stream.trace.kept[0]) == 2 + 4 * frames + (frames // max_run if max_run else 1)
    assert most[4] <= 4 * 5 + 3
    assert most[None] >= 4 * frames + 1


# Refusals -------------------------------------------------------------------------------------------------------------

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
