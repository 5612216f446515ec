"""How often the host waits for the device, beyond what the dense model makes it wait: counted on a pretended GPU.

Nothing per layer, frame, row or token; nothing for counts that are fixed; one wait for a look that has to see the content,
whatever the batch; at most five for the layout. The exceptions are named below.
"""

from __future__ import annotations

import collections
from functools import cache

import pytest
from support import fakecuda
from support.fakecuda import scenarios
from support.fakecuda.scenarios import Counts, Scenario, synchronisations

pytestmark = pytest.mark.skipif(bool(fakecuda.missing()), reason=fakecuda.missing())
LAYOUT = 5
MODELS = ("decoder", "llava_video", "qwen2_5_vl", "qwen3_vl", "internvl")
MERGES_BY_SHARE = {"merge_only": 1, "framefusion_equal": 1, "prune_then_merge": 1}
"""A merge of a fixed count asks once whether so many tokens have a counterpart at all."""
READS_LAYOUT = {"uniform_frames": 1}
"""How large the frames are that are left."""
AT_EACH_LAYER = {"noncascaded_merge": 2 * 4}
"""Two at each of its four looks: what could merge, and which keys each block of queries can see."""
LOOKS = collections.Counter(MERGES_BY_SHARE | READS_LAYOUT | AT_EACH_LAYER)
DEFAULT = {("decoder", 1), ("decoder", 3), ("llava_video", 3)}


@pytest.fixture(autouse=True)
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    scenarios.stand_in_kernels(monkeypatch)


@cache
def dense(model: str, rows: int, frames: int = 4, layers: int = 4) -> Counts:
    return synchronisations("", model, rows, frames, **changed(model, layers))


def changed(model: str, layers: int) -> dict[str, int]:
    return {"num_hidden_layers": layers} if model == "decoder" else {}


def beyond(preset: str, model: str, rows: int, frames: int = 4, layers: int = 4) -> tuple[int, int, Counts]:
    """Waits beyond the dense model's, in the prefill and at a token."""
    ours, theirs = (
        synchronisations(preset, model, rows, frames, **changed(model, layers)),
        dense(model, rows, frames, layers),
    )
    return len(ours.prefill) - len(theirs.prefill), len(ours.token) - len(theirs.token), ours


def listed(counts: Counts) -> str:
    where = collections.Counter((event.what, event.where) for event in counts.prefill)
    return "\n".join(f"{number:4d} {what}  {line}" for (what, line), number in where.most_common())


@pytest.mark.parametrize("preset", scenarios.PRESETS)
@pytest.mark.parametrize(
    ("model", "rows"),
    [pytest.param(m, r, marks=() if (m, r) in DEFAULT else pytest.mark.slow) for m in MODELS for r in (1, 3)],
)
def test_each_preset_waits_within_its_limits(preset: str, model: str, rows: int) -> None:
    if scenarios.refused(Scenario(preset, model)):
        pytest.skip("refused on any device")
    prefill, token, counts = beyond(preset, model, rows)
    assert prefill <= LAYOUT + counts.looks + LOOKS[preset], listed(counts)
    assert token <= 0


@pytest.mark.parametrize("preset", ["framefusion", "fastv", "streaming_llm"])
def test_more_frames_layers_or_rows_are_no_more_waits(preset: str) -> None:
    few = beyond(preset, "decoder", 1, layers=4)
    many = beyond(preset, "decoder", 3, layers=6)
    # A ragged batch has a mask to look at.
    assert many[0] - many[2].looks <= few[0] - few[2].looks + 1, listed(many[2])
    assert many[1] <= 0


@pytest.mark.parametrize("model", ["llava_video", "qwen3_vl", "internvl"])
def test_the_layout_of_a_longer_video_takes_no_more_waits(model: str) -> None:
    few, many = (beyond("fastv", model, 1, frames) for frames in (4, 8))
    assert many[0] <= few[0] <= LAYOUT, listed(many[2])
