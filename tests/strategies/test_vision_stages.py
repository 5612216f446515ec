"""Stages in the vision tower, against a slow tower: a plain loop over frames, blocks and merges."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from support.families import FAMILIES, Family, Image, Part, Text, Video
from support.subjects import SUBJECTS
from support.tiny import assert_same, hooks, snapshot
from torch import Tensor, nn
from transformers import DynamicCache

import tokenreduce as tr
from tokenreduce import plugins
from tokenreduce.errors import (
    NotFiredError,
    PipelineError,
    PluginError,
    TokenReduceError,
    UnsupportedError,
)
from tokenreduce.hookspecs import hookimpl
from tokenreduce.ops.bipartite import bipartite_target
from tokenreduce.pipeline import build, build_vision, load_pipeline, pipeline_problems
from tokenreduce.plugins import adapters
from tokenreduce.reduction import Reduction
from tokenreduce.strategies.tower.patch_merge import ROUND
from tokenreduce.strategy import Capabilities
from tokenreduce.vision import BlockStageConfig, VisionContext, VisionStageConfig, VisionStrategy

BATCHED = ["llava_onevision", "llava_next_video", "llava", "internvl"]
PACKED = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
REUSE = {"strategy": "frame_reuse"}
PRUNE = {"strategy": "random", "at": 1, "keep": 0.5}


def merge(at: int | list[int] = 0, keep: float | list[float] = 0.5, **more: Any) -> dict[str, Any]:
    return {"strategy": "patch_merge", "at": at, "keep": keep, "proportional": False, **more}


def sample(family: Family, frames: int = 4) -> dict[str, Any]:
    """Two rows with a video each, whose frames 1 and 2 are frame 0 again; one row with images where the family has no videos."""
    if family.video is None:
        return dict(family.sample([[Text(4), Image(), Image(), Text(3)]]).inputs)
    inputs = dict(family.sample([[Text(4), Video(frames), Text(3)], [Text(2), Video(frames), Text(5)]]).inputs)
    name = next(name for name in inputs if name.startswith("pixel_values"))
    pixels = inputs[name]
    shape = (2, frames, -1, *pixels.shape[-3:]) if pixels.dim() > 2 else (2, frames, -1, pixels.shape[-1])
    view = pixels.reshape(shape)
    view[:, 1:3] = view[:, :1]
    inputs[name] = view.reshape(pixels.shape)
    return inputs


def adapter_of(model: nn.Module) -> Any:
    return next(cls() for cls in adapters() if cls().matches(model))


@contextmanager
def tower_output(model: nn.Module) -> Iterator[list[Any]]:
    """What the model's tower returns to the model, call by call."""
    seen: list[Any] = []
    handle = adapter_of(model).vision_tower(model).module.register_forward_hook(lambda m, a, o: seen.append(o))
    try:
        yield seen
    finally:
        handle.remove()


def run(model: Any, inputs: dict[str, Any], *stages: dict[str, Any]) -> tuple[Tensor, Any, Any]:
    """Logits, the tower's output and the trace."""
    with torch.no_grad(), tr.reduce(model, {"stages": list(stages)}) as attached, tower_output(model) as seen:
        logits = model(**inputs).logits
    return logits, seen[-1], attached.trace


# The slow tower -------------------------------------------------------------------------------------------------------


def slow_merge(states: list[Tensor], groups: list[list[int]], merges: int, prefix: int) -> list[list[int]]:
    """One round of matching on one frame, pair by pair. groups: original tokens of each token."""
    sources, receivers = list(range(prefix, len(states), 2)), list(range(prefix + 1, len(states), 2))
    edges = []
    for source in sources:
        cosines = [float(torch.cosine_similarity(states[source], states[r], dim=0)) for r in receivers]
        best = max(range(len(receivers)), key=lambda i: cosines[i])
        edges.append((-cosines[best], source, receivers[best]))
    into = {source: receiver for _, source, receiver in sorted(edges)[:merges]}
    return [
        sorted(g + [x for s, r in into.items() if r == place for x in groups[s]])
        for place, g in enumerate(groups)
        if place not in into
    ]


def slow_features(tower: Any, pixels: Tensor, plan: dict[int, float], weighed: bool = False) -> Tensor:
    """(n, D) of one frame (1, C, H, W) before the tower's norm; `plan`: share of the patches left before each block."""
    state: dict[str, Tensor] = {}
    handle = tower.blocks[0].register_forward_pre_hook(lambda m, a, k: state.update(x=a[0]), with_kwargs=True)
    tower.module(pixels)
    handle.remove()
    x = state["x"][0]
    n, prefix = len(x), tower.prefix
    groups = [[i] for i in range(n)]
    for number, block in enumerate(tower.blocks):
        if number in plan:
            left, keep = len(groups) - prefix, max(int(plan[number] * (n - prefix) + 1e-9), 1)
            while left > keep:
                merges = min(left - keep, max(left // ROUND, 1))
                before = {tuple(g): row for g, row in zip(groups, x, strict=True)}
                sizes = {g: len(g) for g in before}
                groups = slow_merge(list(x), groups, merges, prefix)
                x = torch.stack(
                    [sum(before[g] * sizes[g] for g in before if set(g) <= set(new)) / len(new) for new in groups]
                )
                left -= merges
        if weighed and len(groups) < n:
            sizes_now = torch.tensor([float(len(g)) for g in groups], dtype=x.dtype)
            out = block(x[None], sizes_now.log().expand(1, 1, len(x), -1))
        else:
            out = block(x[None], None) if tower.mask else block(x[None])
        x = (out[0] if isinstance(out, tuple) else out)[0]
    whole = torch.empty(n, x.shape[-1], dtype=x.dtype)
    for group, row in zip(groups, x, strict=True):
        whole[group] = row
    return whole


@pytest.mark.parametrize("plan", [{0: 0.5}, {1: 0.25}, {0: 0.8, 1: 0.3}, {0: 0.1}])
@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("weighed", [False, True])
def test_patch_merge_is_the_slow_tower(name: str, plan: dict[int, float], weighed: bool) -> None:
    model = FAMILIES[name].model(torch.float64)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in sample(FAMILIES[name]).items()}
    tower = adapter_of(model).vision_tower(model)
    if max(plan) >= len(tower.blocks) or (weighed and tower.mask is None):
        with pytest.raises(PipelineError):
            run(model, inputs, merge([*plan], [*plan.values()], proportional=weighed))
        return
    with torch.no_grad():
        _, output, trace = run(model, inputs, merge([*plan], [*plan.values()], proportional=weighed))
        pixels: list[Tensor] = []
        handle = tower.module.register_forward_pre_hook(
            lambda m, a, k: pixels.append(a[0] if a else k["pixel_values"]), with_kwargs=True
        )
        model(**inputs)
        handle.remove()
        slow = torch.stack([slow_features(tower, frame[None], plan, weighed) for frame in pixels[0]])
    ours = (output.hidden_states or [output.last_hidden_state])[len(tower.blocks)]
    if ours is None or name == "internvl":
        ours, slow = output.last_hidden_state, tower.module.layernorm(slow)
    torch.testing.assert_close(ours, slow, atol=1e-9, rtol=0)
    frames, n = slow.shape[:2]
    left = [frames * (tower.prefix + max(int(s * (n - tower.prefix) + 1e-9), 1)) for s in plan.values()]
    assert [stage.after for stage in trace.stages] == left
    assert [stage.site for stage in trace.stages] == [f"vision.block[{block}]" for block in plan]


@pytest.mark.parametrize("name", [*BATCHED, *PACKED])
def test_identical_frames_are_encoded_once_and_nothing_changes(name: str) -> None:
    model, inputs = FAMILIES[name].model(), sample(FAMILIES[name])
    with torch.no_grad(), tower_output(model) as seen:
        dense = model(**inputs).logits
    logits, output, trace = run(model, inputs, REUSE)
    for ours, plain in zip(output.values(), seen[-1].values(), strict=True):
        both = zip(ours, plain, strict=True) if isinstance(plain, (tuple, list)) else [(ours, plain)]
        for one, other in both:
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, dense, atol=1e-4, rtol=0)
    assert [(s.site, s.before, s.after) for s in trace.stages] == [
        ("vision.input", *((2, 2) if name == "llava" else (8, 4)))
    ]


@pytest.mark.parametrize("change", ["pixel", "patch", "drift"])
def test_a_frame_is_reused_only_while_every_patch_is_like_the_last_encoded_one(change: str) -> None:
    model = FAMILIES["llava_onevision"].model()
    inputs = dict(FAMILIES["llava_onevision"].sample([[Text(2), Video(6), Text(2)]]).inputs)
    pixels = inputs["pixel_values_videos"]
    pixels[:, 1:] = pixels[:, :1]
    if change == "pixel":  # one pixel of one frame: bit-identical no more
        pixels[0, 2, 0, 5, 5] += 1e-3
        expected = {0.0: 3, 1e-4: 1}  # frame 2, and frame 3, which is not like frame 2
    elif change == "patch":  # a small thing that moves: 1/36 of the frame
        for frame in range(6):
            pixels[0, frame, :, 4 * frame % 24 : 4 * frame % 24 + 4, :4] = 3.0
        expected = {0.2: 6, 50.0: 1}
    else:  # each frame differs from the one before by 0.1 everywhere, and slowly from the first by 0.5
        pixels += torch.arange(6)[None, :, None, None, None] * 0.1
        expected = {0.05: 6, 0.15: 3, 0.25: 2, 0.6: 1}
    for threshold, count in expected.items():
        _, _, trace = run(model, inputs, REUSE | {"threshold": threshold})
        assert trace.stages[0].after == count, threshold


@pytest.mark.parametrize("name", BATCHED)
def test_keeping_all_patches_is_dense_bit_for_bit(name: str) -> None:
    model, inputs = FAMILIES[name].model(), sample(FAMILIES[name])
    with torch.no_grad():
        dense = model(**inputs).logits
    logits, _, trace = run(model, inputs, merge(0, 1.0))
    assert torch.equal(logits, dense)
    assert trace.stages[0].before == trace.stages[0].after > 0


@pytest.mark.parametrize("name", BATCHED)
def test_generate_equals_forward_and_rows_do_not_touch_each_other(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    stages = [REUSE, merge(0, 0.4), PRUNE]
    with torch.no_grad(), tr.reduce(model, {"stages": stages}) as attached:
        inputs = sample(family)
        logits = model(**inputs).logits[:, -1]
        own = attached.trace.stages
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert attached.trace.stages == own
        torch.testing.assert_close(out.logits[0], logits, atol=1e-4, rtol=0)
        beams = model.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)
        assert len(beams) == len(logits)
        assert [s.strategy for s in own[:3]] == ["frame_reuse", "patch_merge", "random"]
        assert [s.stage for s in own[:3]] == [0, 1, 2]
        if family.video is not None:
            row = [Text(4), Video(4), Text(3)]
            alone = family.sample([row])
            name = next(name for name in inputs if name.startswith("pixel_values"))
            alone.inputs[name] = inputs[name][: len(inputs[name]) // 2]
            torch.testing.assert_close(model(**alone.inputs).logits[0, -1], logits[0], atol=1e-4, rtol=0)
    assert "tower" in str(attached.trace)
    assert attached.trace.to_dict()["stages"][0]["site"] == "vision.input"


def test_an_image_and_a_video_in_one_prompt_are_two_calls_of_the_tower() -> None:
    model = FAMILIES["llava_onevision"].model()
    inputs = dict(FAMILIES["llava_onevision"].sample([[Text(2), Video(3), Text(2), Image((48, 24)), Text(2)]]).inputs)
    _, _, trace = run(model, inputs, merge(0, 0.5))
    assert sorted(stage.before for stage in trace.stages) == [3 * 36, 3 * 36]


def test_undo_is_bit_exact_also_after_an_exception_inside() -> None:
    model = FAMILIES["llava_onevision"].model()
    inputs = sample(FAMILIES["llava_onevision"])
    with torch.no_grad():
        dense = model(**inputs).logits
    before = snapshot(model)
    stages = {"stages": [REUSE, merge(1, 0.5), PRUNE]}
    for block, error in ((None, None), (1, RuntimeError), (0, KeyboardInterrupt)):
        attached = tr.reduce(model, stages)
        assert hooks(model) > sum(len(d) for d in before["hooks"][""])
        with torch.no_grad():
            if error is not None:

                def broken(*_: Any, error: type[BaseException] = error) -> None:
                    raise error("inside")

                handle = adapter_of(model).vision_tower(model).blocks[block].register_forward_hook(broken)
                with pytest.raises(error, match="inside"):
                    model(**inputs)
                handle.remove()
            reduced = model(**inputs).logits
        assert not torch.equal(reduced, dense)
        copied = copy.deepcopy(model)
        attached.detach()
        assert_same(model, before)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, dense)
            assert torch.equal(copied(**inputs).logits, dense)


def test_threads_do_not_share_a_visit() -> None:
    model = FAMILIES["llava_onevision"].model()
    prompts = [
        dict(FAMILIES["llava_onevision"].sample([[Text(3), Video(f), Text(4)]], seed=f).inputs) for f in (2, 3, 5, 8)
    ]
    found: dict[int, list[tuple[Tensor, int]]] = {}
    with tr.reduce(model, {"stages": [REUSE, merge(0, 0.3), PRUNE]}) as attached:

        def once(number: int) -> tuple[Tensor, int]:
            with torch.no_grad():
                return model(**prompts[number]).logits, attached.trace.stages[1].before

        def work(number: int) -> None:
            found[number] = [once(number) for _ in range(5)]

        alone = [once(number) for number in range(4)]
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, (logits, tokens) in enumerate(alone):
        assert tokens == 36 * (2, 3, 5, 8)[number]
        for other, count in found[number]:
            assert torch.equal(logits, other)
            assert count == tokens


def test_text_and_decoding_need_no_tower_but_a_prefill_with_vision_does() -> None:
    family = FAMILIES["llava_onevision"]
    model, inputs = family.model(), sample(family)
    ids = torch.arange(10, 20)[None]
    layout = family.sample([[Text(4), Video(4), Text(3)]]).layout
    with torch.no_grad():
        dense = model(input_ids=ids).logits
        embeds = model.get_input_embeddings()(torch.randint(10, 80, layout.shape))
        with tr.reduce(model, {"stages": [REUSE]}):
            assert torch.equal(model(input_ids=ids).logits, dense)
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        unfired = pytest.raises(NotFiredError, match="stage frame_reuse never acted: the vision tower did not run")
        with tr.reduce(model, {"stages": [REUSE, PRUNE]}, layout=layout), unfired:
            model(inputs_embeds=embeds)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([PRUNE, REUSE], r"stages\[1\].strategy: frame_reuse acts at vision.input, before random; list the stages"),
        ([merge(), REUSE], r"stages\[1\].strategy: frame_reuse acts at vision.input, before patch_merge"),
        ([merge() | {"site": "pre_ffn"}], r"stages\[0\].site: .*'vision.block'"),
        ([REUSE | {"site": "vision.block"}], r"frame_reuse cannot act at 'vision.block'; it can at: vision.input"),
        ([merge([0, 1], 0.5)], "`keep` has 1 shares for 2 blocks"),
        ([merge([0, 1], [0.5, 0.6])], "`keep` must fall from block to block"),
        ([merge([1, 0], [0.5, 0.4])], "growing order"),
        ([merge(0, 0)], "a number above 0"),
        ([{"strategy": "patch_merge", "at": 0}], "the field 'keep' is missing"),
        ([REUSE | {"threshold": -1}], "at least 0"),
        ([REUSE | {"treshold": 1}], "unknown field; did you mean 'threshold'"),
        ([REUSE | {"at": 3}], "unknown field"),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused(stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(PipelineError, match=message) as caught:
        load_pipeline({"stages": stages})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "stages", "error", "message"),
    [
        ("smolvlm", [REUSE], UnsupportedError, r"\(smolvlm\): its adapter describes no vision tower.*frame_reuse"),
        ("pixtral", [REUSE], UnsupportedError, r"\(llava\): its adapter describes no vision tower"),
        ("qwen2_vl", [merge()], UnsupportedError, r"\(qwen2_vl\).*packs the patches.*patch_merge cannot"),
        ("internvl", [merge(0, 0.5, proportional=True)], PipelineError, "take no mask.*set `proportional: false`"),
        ("llava", [merge(1)], PipelineError, "patch_merge acts at block 1 .* come from blocks 0 … 0"),
        ("llava_onevision", [REUSE, REUSE], PipelineError, "only one stage can act at vision.input"),
    ],
)
def test_what_a_family_cannot_do_is_refused_by_name(
    name: str, stages: list[dict[str, Any]], error: type[TokenReduceError], message: str
) -> None:
    model = FAMILIES[name].model()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        tr.reduce(model, {"stages": stages})
    assert_same(model, before)


def test_a_budget_is_the_decoders_and_needs_a_stage_there() -> None:
    model = FAMILIES["llava_onevision"].model()
    with pytest.raises(PipelineError, match="no stage of this pipeline chooses its count by a budget"):
        tr.reduce(model, {"stages": [merge()]}, budget=0.5)
    inputs = sample(FAMILIES["llava_onevision"])
    with torch.no_grad(), tr.reduce(model, {"stages": [merge(), PRUNE | {"keep": None}]}, budget=0.8) as attached:
        model(**inputs)
        assert all(0.75 < share <= 0.8 for share in attached.trace.relative_tokens)


def test_the_preset_runs_and_its_parts_are_told_apart() -> None:
    pipeline = load_pipeline("framefusion_end_to_end")
    assert [s.name for s in build_vision(pipeline)] == ["frame_reuse", "patch_merge"]
    assert [s.place for s in build(pipeline)] == [2, 3]
    model = FAMILIES["llava_onevision"].model()
    with torch.no_grad(), tr.reduce(model, pipeline, budget=0.8) as attached:
        model(**sample(FAMILIES["llava_onevision"]))
    assert [s.strategy for s in attached.trace.stages[:3]] == ["frame_reuse", "patch_merge", "similarity_merge"]


def test_what_a_failed_call_left_is_not_in_the_next_trace() -> None:
    model, inputs = FAMILIES["llava_onevision"].model(), sample(FAMILIES["llava_onevision"])
    with torch.no_grad(), tr.reduce(model, {"stages": [REUSE, PRUNE]}) as attached:
        projector = model.model.multi_modal_projector
        handle = projector.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        handle.remove()
        model(**inputs)
        assert [s.strategy for s in attached.trace.stages] == ["frame_reuse", "random", "random"]


# The matching -----------------------------------------------------------------------------------------------------------


def test_zero_and_broken_vectors_are_merged_last() -> None:
    hidden = torch.eye(8)[[0, 0, 1, 0, 2, 2, 3, 3]][None].clone()
    hidden[0, 0] = 0
    hidden[0, 2] = torch.nan
    target = bipartite_target(hidden, torch.ones(8).bool(), 2)[0]
    assert target.tolist() == [0, 1, 2, 3, 5, 5, 7, 7]
    assert not bipartite_target(hidden, torch.ones(8).bool(), 0).ne(torch.arange(8)).any()


# Third parties ----------------------------------------------------------------------------------------------------------


class MergeNeighbours(VisionStrategy):
    """Average each patch with its right neighbour. `how` breaks the contract in one way."""

    name = "merge_neighbours"
    capabilities = Capabilities(sites=("vision.block",), merges=True)

    class Config(BlockStageConfig):
        strategy: Literal["merge_neighbours"] = "merge_neighbours"
        how: str = ""

    def decide(self, ctx: VisionContext) -> Reduction | None:
        column = torch.arange(ctx.n)
        patch = column - (ctx.n - ctx.patches)
        target = torch.where(patch > 0, column - patch % 2, column).repeat(ctx.frames, 1)
        how = self.config.how
        if how == "drop":
            target[:, -1] = -1
        if how == "ragged":
            target[0] = column
        if how == "shape":
            target = target[:1]
        if how == "class token":
            target[:, -1] = 0
        return Reduction.merge(target)


@pytest.fixture
def plugin() -> Iterator[None]:
    plugins.manager.cache_clear()
    module = ModuleType("vision_plugin")

    @hookimpl(specname="tokenreduce_strategies")
    def offered() -> Any:
        return [MergeNeighbours]

    module.offered = offered
    plugins.manager().register(module, "vision-plugin")
    yield
    plugins.manager.cache_clear()


def test_a_plugin_brings_a_vision_strategy(plugin: None) -> None:
    model, stage = FAMILIES["llava_next_video"].model(), {"strategy": "merge_neighbours", "at": 0}
    assert pipeline_problems({"stages": [stage]}) == []
    assert plugins.offered_strategies()["merge_neighbours"].origin == "vision-plugin"
    _, output, trace = run(model, sample(FAMILIES["llava_next_video"]), stage)
    state = output.hidden_states[1]
    assert (trace.stages[0].before, trace.stages[0].after) == (8 * 37, 8 * 19)
    assert torch.equal(state[:, 1::2], state[:, 2::2])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("drop", r"merge_neighbours at vision.block\[0\] drops tokens"),
        ("ragged", "keeps different numbers of tokens in different frames"),
        ("shape", r"returned a reduction of \(1, 37\), expected \(8, 37\)"),
        ("class token", "merges a class token"),
    ],
)
def test_a_plugin_that_breaks_the_contract_is_refused(plugin: None, how: str, message: str) -> None:
    model, inputs = FAMILIES["llava_next_video"].model(), sample(FAMILIES["llava_next_video"])
    model(**inputs)  # transformers puts hooks of its own on in the first call
    before = snapshot(model)
    with pytest.raises(PluginError, match=message):
        run(model, inputs, {"strategy": "merge_neighbours", "at": 0, "how": how})
    assert_same(model, before)


def test_the_config_of_a_vision_strategy_is_checked() -> None:
    class Bad(MergeNeighbours):
        capabilities = Capabilities(sites=("pre_ffn",))

    assert "one site out of vision.input, vision.block" in str(plugins._strategy_fault(Bad))

    class Worse(MergeNeighbours):
        Config = VisionStageConfig

    assert "subclass of tokenreduce.vision.VisionStageConfig" in str(plugins._strategy_fault(Worse))
    assert plugins._strategy_fault(MergeNeighbours) is None


def test_a_video_is_not_compared_with_its_neighbours_in_the_batch() -> None:
    family = FAMILIES["llava_onevision"]
    model = family.model()
    rows = [[Text(4), Video(4), Text(3)], [Text(2), Video(4), Text(5)]]
    inputs = dict(family.sample(rows).inputs)
    pixels = inputs["pixel_values_videos"]
    pixels[1] = pixels[0, -1:]  # The second video stands still, at the last frame of the first.
    _, _, trace = run(model, inputs, {"strategy": "frame_reuse", "threshold": 0.01})
    assert (trace.stages[0].before, trace.stages[0].after) == (8, 5)
    _, _, trace = run(model, inputs, {"strategy": "frame_reuse", "threshold": 0.0})
    assert trace.stages[0].after == 4  # Bit for bit the same: then it does not matter whose it is.


LIKE = {"strategy": "frame_reuse", "threshold": 0.01}
TWO = [[Text(4), Video(4), Text(3)], [Text(2), Video(4), Text(5)]]
SHOWN = {name: FAMILIES[name] for name in ("llava_onevision", "llava_next_video", "internvl")} | {
    "llava_video": SUBJECTS["llava_video"]
}


def still(family: Family, rows: list[list[Part]], begin: int) -> dict[str, Any]:
    """Inputs whose frames from `begin` on are all like the one before it, though not bit for bit."""
    inputs = dict(family.sample(rows).inputs)
    pixels = inputs[next(name for name in inputs if name.startswith("pixel_values"))].view(-1, 3, 24, 24)
    pixels[begin:] = pixels[begin - 1] + 1e-4 * torch.arange(len(pixels) - begin)[:, None, None, None]
    return inputs


def ways(model: Any) -> dict[str, Any]:
    """The calls in which the tower runs before the decoder's prefill."""
    return {
        "forward": model,
        "generate": lambda **inputs: model.generate(**inputs, max_new_tokens=2, do_sample=False),
        "inner": model.model,
    }


@pytest.mark.parametrize("way", ["forward", "generate", "inner"])
@pytest.mark.parametrize("name", SHOWN)
def test_like_frames_of_a_batch_are_those_of_one_video(name: str, way: str) -> None:
    """The second video stands still at the last frame of the first: it is encoded once, and that frame is not it."""
    model = SHOWN[name].model()
    with torch.no_grad(), tr.reduce(model, {"stages": [LIKE]}) as attached:
        for rows, begin, after in ((TWO, 4, 5), ([[*TWO[0], *TWO[1]]], 4, 5), (TWO[:1], 2, 2)):
            ways(model)[way](**still(SHOWN[name], rows, begin))
            frames = 4 * sum(isinstance(part, Video) for row in rows for part in row)
            assert [(s.before, s.after) for s in attached.trace.stages] == [(frames, after)]


@pytest.mark.parametrize("way", ["forward", "generate"])
def test_videos_that_come_frame_by_frame_are_reused_by_video(way: str) -> None:
    """LLaVA-Video takes videos of several lengths as (frames, 1, 3, H, W): the layout says whose they are."""
    family = SUBJECTS["llava_video"]
    model = family.model()
    rows = [[Text(2), Video(3), Text(3), Video(1), Text(1)], [Text(6)], [Text(1), Video(1), Text(2), Video(5), Text(4)]]
    with torch.no_grad(), tr.reduce(model, {"stages": [LIKE]}) as attached:
        for batch, after in ((rows, 4), (rows[:2], 2), ([[Text(2), Video(1), Text(3)], [Text(5), Video(1)]], 2)):
            ways(model)[way](**still(family, batch, 1))
            assert attached.trace.stages[0].after == after


def test_images_of_a_row_are_its_frames_where_a_family_has_no_videos() -> None:
    model = FAMILIES["llava"].model()
    rows = [[Text(4), Image(), Image(), Text(3)], [Text(2), Image(), Text(1)]]
    for batch, after in ((rows, 2), (rows[:1], 1)):
        with torch.no_grad(), tr.reduce(model, {"stages": [LIKE, PRUNE]}) as attached:
            model(**still(FAMILIES["llava"], batch, 1))
            assert attached.trace.stages[0].after == after


@pytest.mark.parametrize("way", ["forward", "generate"])
def test_frames_of_a_batch_that_nobody_can_tell_apart(way: str) -> None:
    """An image in several tiles: they are not frames of the layout."""
    model = FAMILIES["internvl"].model()
    inputs = dict(
        FAMILIES["internvl"].sample([[Text(4), Image((48, 24)), Text(3)], [Text(2), Video(4), Text(5)]]).inputs
    )
    assert len(inputs["pixel_values"]) > 5
    told = pytest.raises(UnsupportedError, match="set `threshold: 0`, or give the videos one by one")
    with torch.no_grad(), tr.reduce(model, {"stages": [LIKE]}), told:
        ways(model)[way](**inputs)


def test_the_tower_keeps_nothing_of_a_call_that_is_over() -> None:
    model = FAMILIES["llava_onevision"].model()
    with torch.no_grad(), tr.reduce(model, {"stages": [LIKE]}) as attached:
        cache = DynamicCache(config=model.config)
        pixels = still(FAMILIES["llava_onevision"], TWO, 4)
        left = [weakref.ref(cache), weakref.ref(pixels["pixel_values_videos"])]
        model.generate(**pixels, past_key_values=cache, max_new_tokens=3, do_sample=False)
        del cache, pixels
        gc.collect()
        assert [ref() for ref in left] == [None, None]
        assert attached.trace.stages[0].after == 5
