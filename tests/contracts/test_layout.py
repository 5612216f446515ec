"""TokenLayout: what it accepts, what it refuses, and which tokens a stage may touch."""

from __future__ import annotations

import pytest
import torch

from tokenreduce.errors import LayoutError
from tokenreduce.layout import NEWLINE, PLAIN, TIMESTAMP, WRAPPER, TokenLayout


def row(*values: int) -> torch.Tensor:
    return torch.tensor([values])


def test_video_counts_slots_and_frames_in_time_order() -> None:
    layout = TokenLayout.video(before=2, frames=2, per_frame=3, after=1)
    assert layout.shape == (1, 9)
    assert layout.slot.tolist() == [[-1, -1, 0, 1, 2, 0, 1, 2, -1]]
    assert layout.frame.tolist() == [[-1, -1, 0, 0, 0, 1, 1, 1, -1]]
    assert layout.vision.tolist() == [[False, False, *[True] * 6, False]]
    assert layout.media().tolist() == [[-1, -1, 0, 0, 0, 0, 0, 0, -1]]
    assert layout.reducible().tolist() == layout.vision.tolist()


def test_text_has_no_vision() -> None:
    layout = TokenLayout.text(3, 5)
    assert layout.shape == (3, 5)
    assert not bool(layout.vision.any())
    assert not bool(layout.reducible().any())
    assert layout.slot is not layout.frame


@pytest.mark.parametrize(
    ("newlines", "wrappers", "expected"),
    [
        ("merge", "protect", [False, True, True, False, False, False]),
        ("protect", "protect", [False, True, False, False, False, False]),
        ("merge", "merge", [False, True, True, True, False, False]),
        ("protect", "merge", [False, True, False, True, False, False]),
    ],
)
def test_markers_follow_the_pipelines_choice(newlines: str, wrappers: str, expected: list[bool]) -> None:
    layout = TokenLayout(
        slot=row(-1, 0, 1, 2, 3, 4),
        frame=row(-1, 0, 0, 0, 0, 0),
        marker=row(PLAIN, PLAIN, NEWLINE, WRAPPER, TIMESTAMP, PLAIN),
        protected=torch.tensor([[False, False, False, False, False, True]]),
    )
    assert layout.reducible(newlines, wrappers).tolist() == [expected]  # type: ignore[arg-type]
    assert layout.vision.tolist() == [[False, *[True] * 5]]


def test_expand_repeats_rows_as_beams_do() -> None:
    layout = TokenLayout(slot=torch.tensor([[0, -1], [1, 1]]), frame=torch.tensor([[0, -1], [0, 1]]))
    wide = layout.expand(6)
    assert wide.slot.tolist() == [[0, -1]] * 3 + [[1, 1]] * 3
    assert wide.medium is None
    assert layout.expand(2) is layout
    with pytest.raises(LayoutError, match="2 rows, the forward 5"):
        layout.expand(5)


def test_to_keeps_every_fact() -> None:
    layout = TokenLayout.video(before=0, frames=1, per_frame=2, after=0)
    moved = layout.to(torch.device("cpu"))
    assert moved.slot.tolist() == [[0, 1]]
    assert moved.frame.tolist() == [[0, 0]]
    assert moved.medium is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot": torch.tensor([0, 1])}, "layout.slot must be (batch, tokens), got shape (2,)"),
        ({"frame": row(0)}, "layout.frame has shape (1, 1), but layout.slot has (1, 2)"),
        ({"frame": row(-1, 0)}, "disagree on which tokens are vision"),
        ({"medium": row(0)}, "layout.medium has shape (1, 1)"),
        ({"medium": row(0, -1)}, "layout.medium is negative for a vision token"),
        ({"protected": torch.zeros(1, 3, dtype=torch.bool)}, "layout.protected has shape (1, 3)"),
        ({"slot": torch.tensor([[0.0, 1.0]])}, "layout.slot must be a long tensor, got torch.float32"),
        ({"frame": torch.tensor([[True, True]])}, "layout.frame must be a long tensor, got torch.bool"),
        ({"marker": torch.tensor([[0.5, 0.0]])}, "layout.marker must be a long tensor, got torch.float32"),
        ({"protected": row(0, 1)}, "layout.protected must be a bool tensor, got torch.int64"),
        ({"slot": [[0, 1]]}, "layout.slot must be a long tensor, got list"),
    ],
)
def test_layouts_that_contradict_themselves_are_refused(change: dict, message: str) -> None:
    with pytest.raises(LayoutError) as error:
        TokenLayout(**{"slot": row(0, 1), "frame": row(0, 0), **change})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_text_that_follows() -> None:
    layout = TokenLayout.video(before=1, frames=2, per_frame=2, after=1)
    longer = layout.followed_by_text(3)
    assert longer.slot.tolist() == [[-1, 0, 1, 0, 1, -1, -1, -1, -1]]
    assert longer.frame.tolist() == [[-1, 0, 0, 1, 1, -1, -1, -1, -1]]
    assert longer.media().tolist() == [[-1, 0, 0, 0, 0, -1, -1, -1, -1]]
    assert layout.followed_by_text(0).shape == layout.shape
