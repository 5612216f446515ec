"""A strategy in the vision tower that breaks its contract is named, and the model is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import pytest
import torch
from support.families import FAMILIES, Text, Video
from support.tiny import assert_same, snapshot

import tokenreduce as tr
from tokenreduce.errors import PluginError
from tokenreduce.hookspecs import hookimpl
from tokenreduce.plugins import manager
from tokenreduce.reduction import Reduction
from tokenreduce.strategy import Capabilities, Decision
from tokenreduce.vision import BlockStageConfig, VisionContext, VisionSite, VisionStageConfig, VisionStrategy


class OfFrames(VisionStrategy):
    """Does what the test says."""

    name = "of_frames"
    capabilities = Capabilities(sites=("vision.input",), merges=True, content_dependent=True)
    act: ClassVar[Callable[[VisionContext], Any]]

    class Config(VisionStageConfig):
        strategy: Literal["of_frames"] = "of_frames"

    def decide(self, ctx: VisionContext) -> Any:
        return type(self).act(ctx)


class OfTokens(VisionStrategy):
    """Does what the test says."""

    name = "of_tokens"
    capabilities = Capabilities(sites=("vision.block",), merges=True)
    act: ClassVar[Callable[[VisionContext], Any]]

    class Config(BlockStageConfig):
        strategy: Literal["of_tokens"] = "of_tokens"

    def decide(self, ctx: VisionContext) -> Any:
        return type(self).act(ctx)


STAGES: dict[str, tuple[type[VisionStrategy], dict[str, Any], str]] = {
    "frames": (OfFrames, {"strategy": "of_frames"}, "strategy of_frames at vision.input"),
    "tokens": (OfTokens, {"strategy": "of_tokens", "at": 0}, r"strategy of_tokens at vision.block\[0\]"),
}


@pytest.fixture(autouse=True)
def plugin() -> Iterator[None]:
    class Plugin:
        @hookimpl
        def tokenreduce_strategies(self) -> list[type[VisionStrategy]]:
            return [OfFrames, OfTokens]

    plugin = Plugin()
    manager().register(plugin, "test-plugin:vision")
    yield
    manager().unregister(plugin)


def whole(ctx: VisionContext) -> torch.Tensor:
    """The target that leaves everything."""
    if ctx.site.kind == "vision.input":
        return torch.arange(ctx.frames)[None]
    return torch.arange(ctx.n).repeat(ctx.frames, 1)


def write(x: torch.Tensor, answer: Any) -> Any:
    x.zero_()
    return answer


def raised(error: Exception) -> Any:
    raise error


FAULTS: dict[str, tuple[Callable[[VisionContext], Any], str]] = {
    "raises": (lambda ctx: {}["x"], " failed: KeyError: 'x'"),
    "raises_many_lines": (lambda ctx: raised(ValueError("a\nb")), " failed: ValueError: a b$"),
    "stops": (lambda ctx: raised(StopIteration()), " failed: StopIteration$"),
    "a_tensor": (lambda ctx: torch.ones(3), " returned a Tensor, not a Reduction"),
    "a_decision": (lambda ctx: Decision(), " returned a Decision, not a Reduction"),
    "no_target": (lambda ctx: Reduction(None), ": Reduction.target must be a .* got a NoneType"),  # type: ignore[arg-type]
    "a_list": (lambda ctx: Reduction([0]), ": Reduction.target must be a .* got a list"),  # type: ignore[arg-type]
    "floats": (lambda ctx: Reduction(whole(ctx).float()), ": Reduction.target must be a .* got torch.float32"),
    "another_device": (lambda ctx: Reduction(whole(ctx).to("meta")), " returned a reduction on meta, but its tokens"),
    "too_many": (lambda ctx: Reduction(torch.arange(99)[None]), r" returned a reduction of \(1, 99\), expected"),
    "weighting": (
        lambda ctx: Reduction(whole(ctx), weighting="junk"),  # type: ignore[arg-type]
        ": Reduction.weighting must be size, plain or keep_first, got 'junk'",
    ),
    "counts": (lambda ctx: Reduction(whole(ctx), counts=5), ": Reduction.counts must be a tuple"),  # type: ignore[arg-type]
    "drops": (lambda ctx: Reduction(torch.full_like(whole(ctx), -1)), " drops tokens"),
    "writes_to_hidden": (lambda ctx: Reduction(write(ctx.hidden[:, :1], whole(ctx))), " changed ctx.hidden in place"),
}


@pytest.mark.parametrize("where", STAGES)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (act, match), (cls, stage, who) = FAULTS[fault], STAGES[where]
    monkeypatch.setattr(cls, "act", staticmethod(act), raising=False)
    family = FAMILIES["llava_onevision"]
    model, inputs = family.model(), dict(family.sample([[Text(3), Video(4), Text(4)]]).inputs)
    with torch.no_grad():
        dense = model(**inputs).logits
        before = snapshot(model)
        with tr.reduce(model, {"stages": [stage]}):
            with pytest.raises(PluginError, match=who + match) as caught:
                model(**inputs)
            assert "\n" not in str(caught.value)
            monkeypatch.setattr(cls, "act", staticmethod(lambda ctx: None))
            assert torch.equal(model(**inputs).logits, dense)
        assert_same(model, before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_pixels_are_not_written_to_unseen(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed patches are shown as the caller gave them."""
    monkeypatch.setattr(OfFrames, "act", staticmethod(lambda ctx: write(ctx.hidden, None)), raising=False)
    family = FAMILIES["qwen2_vl"]
    model = family.model()
    with mode(), tr.reduce(model, {"stages": [{"strategy": "of_frames"}]}):
        inputs = {name: x.clone() for name, x in family.sample([[Text(3), Video(4), Text(4)]]).inputs.items()}
        with pytest.raises(PluginError, match=r"of_frames at vision\.input changed ctx\.hidden in place"):
            model(**inputs)


def test_sizes_are_the_strategys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does to them changes no mean of a later block."""

    def pairs(ctx: VisionContext) -> Reduction:
        return Reduction.merge((torch.arange(ctx.n) // 2 * 2).repeat(ctx.frames, 1))

    def scribble(ctx: VisionContext) -> Reduction:
        ctx.size.mul_(torch.arange(ctx.n) + 2)
        ctx.movable.fill_(False)
        return pairs(ctx)

    family = FAMILIES["llava_onevision"]
    model, inputs = family.model(), dict(family.sample([[Text(3), Video(4), Text(4)]]).inputs)
    found = []
    for act in (pairs, scribble):
        monkeypatch.setattr(OfTokens, "act", staticmethod(act), raising=False)
        with torch.no_grad(), tr.reduce(model, {"stages": [{"strategy": "of_tokens", "at": [0, 1]}]}):
            found.append(model(**inputs).logits)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda *_: {}["x"], "its schedule failed: KeyError: 'x'"),
        (lambda *_: [], r"its schedule must be a list of at least one VisionSite, got \[\]"),
        (lambda *_: [0], r"its schedule must be a list of at least one VisionSite, got \[0\]"),
        (lambda *_: [VisionSite("vision.block", 99)], r"its schedule has \('vision.block', 99\)"),
        (
            lambda *_: [VisionSite("vision.input")],
            r"its schedule has \('vision.input', -1\), but it can act at vision.block",
        ),
        (
            lambda *_: [VisionSite("vision.block", 1), VisionSite("vision.block", 0)],
            "its schedule must name its sites in growing order",
        ),
    ],
)
def test_a_schedule_that_is_none(answer: Any, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OfTokens, "schedule", answer)
    model = FAMILIES["llava_onevision"].model()
    before = snapshot(model)
    with pytest.raises(PluginError, match=f"strategy of_tokens: {match}") as caught:
        tr.reduce(model, {"stages": [{"strategy": "of_tokens", "at": 0}]})
    assert "\n" not in str(caught.value)
    assert_same(model, before)
