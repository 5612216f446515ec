"""Pixels of the pictures: kept patches are the frame, merged ones tinted, dropped ones dark; curves stand right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tokenreduce.errors import LayoutError
from tokenreduce.layout import NEWLINE
from tokenreduce.media import pictures
from tokenreduce.media.pictures import DROPPED, KEPT, MERGED
from tokenreduce.media.sheet import Sheet

GRID = (4, 5)
HEIGHT, WIDTH = 200, 250  # cells of 50 × 50 pixels, shown as they are
BEFORE, AFTER = 3, 2


def layout(frames: int) -> dict[str, Any]:
    """Four rows of five patches, each with a newline behind it, between some text: as in LLaVA-Video, but small."""
    per_frame = 4 * 6
    index = np.arange(frames * per_frame)
    text = [np.full(n, -1) for n in (BEFORE, AFTER)]
    slot = np.concatenate([text[0], index % per_frame, text[1]])
    frame = np.concatenate([text[0], index // per_frame, text[1]])
    return {"slot": slot, "frame": frame, "marker": np.where(slot % 6 == 5, NEWLINE, 0) * (slot >= 0)}


def position(frame: int, row: int, column: int) -> int:
    return BEFORE + frame * 24 + row * 6 + column


def noise(frames: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def cell(image: np.ndarray, row: int, column: int) -> np.ndarray:
    return image[row * 50 : row * 50 + 50, column * 50 : column * 50 + 50]


def shown(path: Path, rows: int, columns: int, row: int, column: int, side: int = 0) -> np.ndarray:
    """The pixels of one frame on a sheet."""
    x, y = Sheet((HEIGHT, WIDTH), rows, columns, side).corner(row, column)
    with Image.open(path) as page:
        return np.asarray(page)[y : y + HEIGHT, x : x + WIDTH]


def example() -> np.ndarray:
    """Four frames: one patch of frame 1 merged into frame 0, one of frame 2 through it, two of frame 3 dropped."""
    source = np.arange(BEFORE + 4 * 24 + AFTER)
    source[[position(1, 2, 3), position(2, 2, 3)]] = position(0, 2, 3)
    source[[position(3, 0, 0), position(3, 3, 4)]] = -1
    return source


def test_patches_skip_newlines_and_follow_their_slots() -> None:
    order = np.random.default_rng(1).permutation(BEFORE + 2 * 24 + AFTER)
    facts = {name: values[order] for name, values in layout(2).items()}
    where = pictures.patch_positions(facts["slot"], facts["frame"], GRID, facts["marker"])
    assert where.shape == (2, 4, 5)
    for frame, row, column in np.ndindex(where.shape):
        assert order[where[frame, row, column]] == position(frame, row, column)


def test_states_say_kept_merged_dropped() -> None:
    where = pictures.patch_positions(**layout(4), grid=GRID)
    states = pictures.patch_states(example(), where)
    assert states[0].tolist() == np.full(GRID, KEPT).tolist()
    assert (states[1, 2, 3], states[2, 2, 3]) == (MERGED, MERGED)
    assert (states[3, 0, 0], states[3, 3, 4]) == (DROPPED, DROPPED)
    assert [int((states == s).sum()) for s in (KEPT, MERGED, DROPPED)] == [76, 2, 2]


def test_a_sheet_shows_kept_patches_pixel_for_pixel(tmp_path: Path) -> None:
    frames = noise(4)
    path = pictures.kept_patches(frames, **layout(4), source=example(), grid=GRID, path=tmp_path / "sheet.png")
    drawn = [shown(path, 1, 4, 0, i) for i in range(4)]
    where = pictures.patch_positions(**layout(4), grid=GRID)
    states = pictures.patch_states(example(), where)
    for frame, row, column in np.ndindex(where.shape):
        same = np.array_equal(cell(drawn[frame], row, column), cell(frames[frame], row, column))
        assert same == (states[frame, row, column] == KEPT)


def test_dropped_patches_are_dark_grey_and_merged_ones_blue(tmp_path: Path) -> None:
    white = np.full((4, HEIGHT, WIDTH, 3), 255, np.uint8)
    path = pictures.kept_patches(white, **layout(4), source=example(), grid=GRID, path=tmp_path / "sheet.png")
    dropped, merged = cell(shown(path, 1, 4, 0, 3), 0, 0), cell(shown(path, 1, 4, 0, 1), 2, 3)
    assert dropped.max() < 100
    assert int(dropped.max()) - int(dropped.min()) < 10
    assert (merged[..., 2].astype(int) - merged[..., 0] > 60).all()
    assert (merged[0] == pictures.OUTLINE_COLOUR).all()
    assert not (merged[1:-1, 1:-1] == pictures.OUTLINE_COLOUR).all(-1).any()


def test_neighbouring_merged_patches_share_one_outline() -> None:
    states = np.full(GRID, KEPT)
    states[1, 1:3] = MERGED
    drawn = pictures.render_frame(noise(1)[0], states)
    outlined = (drawn == pictures.OUTLINE_COLOUR).all(-1)
    assert outlined[50, 50:150].all()
    assert outlined[50:100, [50, 149]].all()
    assert not outlined[51:99, 51:149].any()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 255), st.integers(0, 255))
def test_merged_is_brighter_than_dropped_whatever_the_picture(seed: int, low: int, high: int) -> None:
    # Readers who see no hue tell the two apart by brightness (weights of ITU-R BT.601).
    random = np.random.default_rng(seed)
    picture = random.integers(min(low, high), max(low, high) + 1, (8, 8, 3), dtype=np.uint8)
    states = np.array([[MERGED, DROPPED]])
    brightness = pictures.render_frame(picture, states) @ [0.299, 0.587, 0.114]
    assert brightness[1:-1, 1:3].min() > brightness[:, 4:].max()


def test_blank_leaves_holes_for_all_but_the_kept(tmp_path: Path) -> None:
    frames = noise(4)
    path = pictures.kept_patches(
        frames, **layout(4), source=example(), grid=GRID, path=tmp_path / "sheet.png", show="blank"
    )
    assert (cell(shown(path, 1, 4, 0, 1), 2, 3) == 255).all()
    assert (cell(shown(path, 1, 4, 0, 3), 3, 4) == 255).all()
    assert np.array_equal(shown(path, 1, 4, 0, 0), frames[0])


def test_average_shows_the_mean_of_each_group() -> None:
    frames = noise(4)
    where = pictures.patch_positions(**layout(4), grid=GRID)
    mean = pictures.averaged(frames, example(), where)
    group = [cell(frames[i], 2, 3).astype(float) for i in (0, 1, 2)]
    for i in (0, 1, 2):
        assert np.array_equal(cell(mean[i], 2, 3), np.mean(group, axis=0).round())
    alone = pictures.patch_states(example(), where) != MERGED
    alone[0, 2, 3] = False
    for frame, row, column in np.argwhere(alone):
        assert np.array_equal(cell(mean[frame], row, column), cell(frames[frame], row, column))


def test_many_frames_are_thinned_out_with_the_ends_kept(tmp_path: Path) -> None:
    frames = noise(40)
    source = np.arange(BEFORE + 40 * 24 + AFTER)
    path = pictures.kept_patches(frames, **layout(40), source=source, grid=GRID, path=tmp_path / "s.png", most=8)
    assert np.array_equal(shown(path, 2, 4, 0, 0), frames[0])
    assert np.array_equal(shown(path, 2, 4, 1, 3), frames[39])


@pytest.mark.parametrize(("height", "width"), [(720, 1280), (37, 61), (1, 1), (300, 201)])
def test_frames_of_any_size_are_scaled_to_be_readable(tmp_path: Path, height: int, width: int) -> None:
    frames = np.full((2, height, width, 3), (200, 40, 90), np.uint8)
    source = np.arange(BEFORE + 2 * 24 + AFTER)
    path = pictures.kept_patches(frames, **layout(2), source=source, grid=GRID, path=tmp_path / "s.png", times=[0, 1.5])
    with Image.open(path) as page:
        colours = np.asarray(page).reshape(-1, 3)
        assert page.width >= 500
    pixels = int((colours == (200, 40, 90)).all(1).sum())
    assert pixels >= 2 * 128 * max(1, round(128 * height / width) - GRID[0])


def test_a_comparison_has_a_row_per_arm_under_the_input(tmp_path: Path) -> None:
    frames = noise(4)
    sources = {"nothing": np.arange(len(example())), "an arm with a name that is far too long to fit": example()}
    path = pictures.comparison_sheet(frames, **layout(4), sources=sources, grid=GRID, path=tmp_path / "s.png")
    drawn = [[shown(path, 3, 4, row, i, side=pictures.SIDE) for i in range(4)] for row in range(3)]
    for i in range(4):
        assert np.array_equal(drawn[0][i], frames[i])
        assert np.array_equal(drawn[1][i], frames[i])
    assert np.array_equal(drawn[2][0], frames[0])
    assert cell(drawn[2][3], 0, 0).max() < 100


def test_frames_that_do_not_fit_the_layout_are_refused(tmp_path: Path) -> None:
    path, source = tmp_path / "s.png", np.arange(BEFORE + 2 * 24 + AFTER)
    with pytest.raises(LayoutError, match="2 frames with patches, but 3 frames"):
        pictures.kept_patches(noise(3), **layout(2), source=source, grid=GRID, path=path)
    with pytest.raises(LayoutError, match="frame 0 has 20 patches, which is not a grid of 4 × 6"):
        pictures.kept_patches(noise(2), **layout(2), source=source, grid=(4, 6), path=path)
    with pytest.raises(LayoutError, match="uint8"):
        pictures.kept_patches(noise(2) / 255, **layout(2), source=source, grid=GRID, path=path)
    assert not path.exists()


def height_of(path: Path, colour: str, left: float, right: float) -> float:
    """Topmost place of a curve (0 top, 1 bottom) between two shares of the width; its line may be dashed."""
    with Image.open(path) as page:
        image = np.asarray(page.convert("RGB")).astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    part = image[:, int(left * image.shape[1]) : int(right * image.shape[1])]
    rows = (np.abs(part - wanted).sum(-1) < 12).any(1).nonzero()[0]
    return float(rows.min()) / image.shape[0]


def test_curves_stand_at_the_height_of_their_tokens(tmp_path: Path) -> None:
    arms = {"dense": [1000.0] * 28, "half": [750.0] * 14 + [500.0] * 14, "low": [250.0] * 28}
    path = pictures.tokens_per_layer(arms, tmp_path / "tokens.png", budget=600)
    dense, half, low = (height_of(path, colour, 0.7, 0.9) for colour in pictures.COLOURS[:3])
    assert dense < half < low
    assert (half - dense) / (low - dense) == pytest.approx(500 / 750, abs=0.02)
    early = height_of(path, pictures.COLOURS[1], 0.2, 0.4)
    assert (early - dense) / (low - dense) == pytest.approx(250 / 750, abs=0.02)


def test_a_plan_is_drawn_with_its_totals(tmp_path: Path) -> None:
    tokens = {"dense": [100] * 4, "fastv": [100, 100, 20, 20]}
    flops = {name: [n * 10**9 for n in counts] for name, counts in tokens.items()}
    path = pictures.plan_plot(tokens, flops, tmp_path / "plan.png", budget=60, title="tiny")
    with Image.open(path) as page:
        assert page.size[0] > 800
        assert page.size[1] > 800
    assert height_of(path, pictures.COLOURS[0], 0.6, 0.9) < height_of(path, pictures.COLOURS[1], 0.6, 0.9) < 0.5


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_plots_are_written_in_the_format_of_their_name(tmp_path: Path, kind: str) -> None:
    path = pictures.tokens_per_layer({"a": [3, 2, 1]}, tmp_path / f"plot.{kind}")
    head = path.read_bytes()[:40]
    assert {"png": b"PNG", "svg": b"<?xml", "pdf": b"%PDF"}[kind] in head
