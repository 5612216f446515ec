"""A budget in vision tokens, and one that each image or video has to itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.decoders import decoder, embeddings, tokens_of

import tokenreduce as tr
from tokenreduce.errors import BudgetError, PipelineError

FRAMES = (8, 3, 1)
SLOTS, WORDS = 6, 3


def layout() -> tr.TokenLayout:
    """Videos of 8 and 3 frames and an image, 6 tokens a frame, with 3 words before each."""
    columns = []
    for medium, frames in enumerate(FRAMES):
        columns += [(-1, -1, -1)] * WORDS
        columns += [(slot, frame, medium) for frame in range(frames) for slot in range(SLOTS)]
    slot, frame, medium = torch.tensor(columns).T.unsqueeze(1)
    return tr.TokenLayout(slot=slot.contiguous(), frame=frame.contiguous(), medium=medium.contiguous())


LAYOUT = layout()
TOTAL = LAYOUT.shape[1]
VISION = TOTAL - WORDS * len(FRAMES)


def prefill(stages: list[dict[str, Any]], budget: Any, depth: int = 8, kind: str = "mixed", **more: Any) -> tr.Trace:
    model = decoder(depth)
    with torch.no_grad(), tr.reduce(model, {"stages": stages}, layout=LAYOUT, budget=budget, **more) as run:
        model(inputs_embeds=embeddings(LAYOUT, 32, kind), logits_to_keep=1)
    return run.trace


def of_each(trace: tr.Trace) -> list[int]:
    """Vision tokens of each medium that are left in the end."""
    kept = trace.kept[0]
    return [int((LAYOUT.medium[0, kept] == medium).sum()) for medium in range(len(FRAMES))]


RANDOM = {"strategy": "random", "at": 0}
FASTV = {"strategy": "fastv", "at": 2}
MERGE = {"strategy": "similarity_merge", "threshold": 0.6}


@pytest.mark.parametrize("count", [9, 16, 40, VISION])
@pytest.mark.parametrize("stage", [RANDOM, FASTV], ids=lambda stage: stage["strategy"])
def test_a_number_of_vision_tokens_is_the_mean_over_layers(stage: dict[str, Any], count: int) -> None:
    depth, first = 8, stage["at"]
    budget = {"tokens": count, "of": "vision"}
    if count * depth < VISION * first + depth - first:
        with pytest.raises(BudgetError, match=r"tokens$"):
            prefill([stage], budget)
        return
    held = [tokens - WORDS * len(FRAMES) for tokens in tokens_of(prefill([stage], budget))[0]]
    assert held[first] == (count * depth - VISION * first) // (depth - first)
    assert count * depth - (depth - first) < sum(held) <= count * depth


@pytest.mark.parametrize(("stage", "depth"), [(RANDOM, 8), (FASTV, 8), ({"strategy": "importance_prune", "at": 1}, 8)])
def test_each_medium_has_the_budget_to_itself(stage: dict[str, Any], depth: int) -> None:
    budget = {"tokens": 20, "of": "vision", "per": "medium"}
    trace = prefill([stage], budget, depth)
    first = stage["at"] + (stage["strategy"] == "importance_prune")
    for frames, left in zip(FRAMES, of_each(trace), strict=True):
        alone = frames * SLOTS
        assert left == min(alone, (20 * depth - alone * first) // (depth - first)), frames
    assert len(trace.kept[0]) == WORDS * len(FRAMES) + sum(of_each(trace))


def test_a_share_per_medium_is_of_its_own_tokens() -> None:
    assert of_each(prefill([RANDOM], {"tokens": 0.5, "of": "vision", "per": "medium"})) == [24, 9, 3]


def test_a_merge_ends_in_each_medium_by_itself() -> None:
    """Every medium meets its budget, and merging in one says nothing about another."""
    trace = prefill([MERGE, {"strategy": "importance_prune"}], {"tokens": 10, "of": "vision", "per": "medium"})
    assert of_each(trace)[2] == SLOTS
    assert {stage.note.partition(":")[0] for stage in trace.stages} == {"medium 0", "medium 1", "medium 2"}
    for medium, frames in enumerate(FRAMES):
        own = (LAYOUT.medium[0] == medium).nonzero()[:, 0]
        ends = trace.source[0, own]
        assert all(int(end) < 0 or int(LAYOUT.medium[0, end]) == medium for end in ends)
        assert of_each(trace)[medium] <= min(10 * 8, frames * SLOTS)


def test_a_medium_that_cannot_meet_its_budget_is_named() -> None:
    budget = {"tokens": 8, "of": "vision", "per": "medium"}
    with pytest.raises(
        BudgetError, match=r"of medium 0 cannot be met: .*the smallest feasible budget here is 13 tokens"
    ):
        prefill([FASTV], budget)
    prefill([FASTV], {"tokens": 13, "of": "vision", "per": "medium"})
    trace = prefill([FASTV], budget, on_infeasible="least")
    assert of_each(trace) == [1, 4, 6]
    assert "of medium 0 cannot be met" in str(trace)


def test_the_cache_of_the_whole_sequence_has_no_budget_per_medium() -> None:
    with pytest.raises(PipelineError, match="streaming_window acts on the KV cache of the whole sequence"):
        prefill([{"strategy": "streaming_window"}], {"tokens": 8, "of": "vision", "per": "medium"})
