"""Pictures of a run: tokens per layer (the paper's Fig. 14) and what became of each patch (its Figs. 20 to 22).

Colours are of the Okabe-Ito set, which colour-blind readers tell apart; curves also differ in line style, and kept,
merged and dropped patches in brightness.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from tokenreduce.errors import LayoutError
from tokenreduce.layout import NEWLINE, PLAIN, TokenLayout
from tokenreduce.media.sheet import Sheet

Pixels = NDArray[np.uint8]
Indices = NDArray[np.int64]
Show = Literal["marks", "blank", "average"]

KEPT, MERGED, DROPPED = 0, 1, 2
MERGED_COLOUR = (86, 180, 233)
OUTLINE_COLOUR = (0, 114, 178)
DROPPED_COLOUR = (58, 58, 64)
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
UNITS = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1, "FLOP"))
STYLES = ("-", "--", "-.", ":")
LEGENDS: dict[Show, tuple[tuple[tuple[int, int, int] | None, str], ...]] = {
    "marks": ((None, "kept: as it is"), (MERGED_COLOUR, "merged into an earlier patch"), (DROPPED_COLOUR, "dropped")),
    "blank": ((None, "kept: as it is"), ((255, 255, 255), "white: merged or dropped")),
    "average": ((None, "mean of the patches merged into one token"), (DROPPED_COLOUR, "dropped")),
}
THUMB = 256
"""Frames are drawn about this wide, in pixels."""
SIDE = 168
"""Room for the arms' names beside a comparison, in pixels."""


def tokens_per_layer(
    arms: Mapping[str, Sequence[float]], path: str | Path, budget: float | None = None, *, title: str = ""
) -> Path:
    """Tokens that each layer holds, one curve per arm (the paper's Fig. 14); the area under it is the budget.

    arms: tokens per layer by the arm's name. budget: mean tokens per layer that was asked for, drawn as a thin line.
    Returns `path`; the ending of its name chooses the format.
    """
    figure = Figure(figsize=(7.5, 4.4), dpi=150, layout="constrained")
    axis = figure.add_subplot()
    labels = {name: f"{name}: mean {np.mean(tokens):,.0f}" for name, tokens in arms.items()}
    _steps(axis, arms, labels)
    _budget_line(axis, budget)
    axis.set(title=title or "Tokens per layer", xlabel="layer", ylabel="tokens")
    return _save(figure, axis, path)


def plan_plot(
    tokens: Mapping[str, Sequence[float]],
    flops: Mapping[str, Sequence[float]],
    path: str | Path,
    budget: float | None = None,
    *,
    title: str = "",
) -> Path:
    """What a plan predicts for each layer: tokens above, FLOPs below, one curve per arm.

    tokens, flops: per layer, by the arm's name; both have the same arms. budget: mean tokens per layer asked for.
    """
    figure = Figure(figsize=(7.5, 6.4), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    highest = max((max(layers) for layers in flops.values()), default=0)
    size, unit = next((pair for pair in UNITS if highest >= pair[0]), UNITS[-1])
    labels = {
        name: f"{name}: mean {np.mean(tokens[name]):,.0f} tokens, {np.sum(layers) / size:,.1f} {unit}"
        for name, layers in flops.items()
    }
    _steps(upper, tokens, labels)
    _steps(lower, {name: np.asarray(layers) / size for name, layers in flops.items()}, {})
    _budget_line(upper, budget)
    upper.set(title=title or "Plan", ylabel="tokens")
    lower.set(xlabel="layer", ylabel=unit)
    return _save(figure, upper, path)


def _steps(axis: Any, arms: Mapping[str, Any], labels: Mapping[str, str]) -> None:
    for number, (name, values) in enumerate(arms.items()):
        edges = np.arange(len(values) + 1) - 0.5
        style = STYLES[number % len(STYLES)]
        axis.stairs(
            values, edges, baseline=None, label=labels.get(name), color=COLOURS[number % len(COLOURS)], lw=2, ls=style
        )
    axis.set_ylim(bottom=0)
    axis.margins(x=0.01)
    axis.grid(axis="y", color="#dddddd", lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _budget_line(axis: Any, budget: float | None) -> None:
    if budget is not None:
        axis.axhline(budget, color="#777777", lw=1, label=f"budget: mean {budget:,.0f}")


def _save(figure: Any, labelled: Any, path: str | Path) -> Path:
    handles, labels = labelled.get_legend_handles_labels()
    longest = max(map(len, labels), default=0)
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3 if longest < 28 else 2 if longest < 48 else 1,
        frameon=False,
    )
    figure.savefig(path)
    return Path(path)


def frame_grid(layout: TokenLayout, aspect: float) -> tuple[int, int] | None:
    """(rows, columns) of a frame's patches: from its newlines, else a square, else the factors nearest to height / width.

    None where frames differ in the number of their patches.
    """
    slot, frame = layout.slot[0].cpu().numpy(), layout.frame[0].cpu().numpy()
    marker = np.zeros_like(slot) if layout.marker is None else layout.marker[0].cpu().numpy()
    patch = (slot >= 0) & (marker == PLAIN)
    counts = np.unique(frame[patch], return_counts=True)[1]
    if len(counts) == 0 or (counts != counts[0]).any():
        return None
    count = int(counts[0])
    newlines = int(((slot >= 0) & (marker == NEWLINE) & (frame == frame[patch].min())).sum())
    if newlines and count % newlines == 0:
        return newlines, count // newlines
    pairs = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    return min(pairs, key=lambda pair: (pair[0] != pair[1], abs(np.log(pair[0] / pair[1] / aspect))))


def patch_positions(
    slot: ArrayLike, frame: ArrayLike, grid: tuple[int, int], marker: ArrayLike | None = None
) -> Indices:
    """(frames, rows, columns): the position in the sequence of each patch.

    slot, frame, marker: (N,), see TokenLayout; None for `marker` means that all vision tokens are patches. The patches
    of a frame fill the grid row by row in the order of their slots. Raises LayoutError where they are more or fewer.
    """
    slots, frames = np.asarray(slot), np.asarray(frame)
    patch = slots >= 0 if marker is None else (slots >= 0) & (np.asarray(marker) == PLAIN)
    where = np.flatnonzero(patch)
    where = where[np.lexsort((slots[where], frames[where]))]
    numbers, counts = np.unique(frames[where], return_counts=True)
    rows, columns = grid
    for number, count in zip(numbers, counts, strict=True):
        if count != rows * columns:
            raise LayoutError(f"frame {number} has {count} patches, which is not a grid of {rows} × {columns}")
    return where.reshape(-1, rows, columns).astype(np.int64)


def patch_states(source: ArrayLike, positions: Indices) -> Indices:
    """KEPT, MERGED or DROPPED for each of `positions`. source: (N,), where each token ended, −1 if dropped."""
    ended = np.asarray(source)[positions]
    return np.where(ended < 0, DROPPED, np.where(ended == positions, KEPT, MERGED)).astype(np.int64)


def render_frame(picture: Pixels, states: Indices, show: Show = "marks") -> Pixels:
    """A copy of `picture` (H, W, 3) that shows what became of its patches; states: (rows, columns), dividing H and W.

    Kept patches are left as they are. `marks`: merged ones are tinted and framed, dropped ones nearly black. `blank`:
    both are white, as in the paper's Fig. 21. `average`: merged ones stay too, for pictures that `averaged` made.
    """
    rows, columns = states.shape
    state = states.repeat(picture.shape[0] // rows, axis=0).repeat(picture.shape[1] // columns, axis=1)[..., None]
    if show == "blank":
        return np.where(state == KEPT, picture, np.uint8(255))
    grey = picture.mean(axis=2, keepdims=True)
    marked = np.where(state == DROPPED, DROPPED_COLOUR + 0.12 * grey, picture)
    if show == "marks":
        merged = state == MERGED
        marked = np.where(merged, 0.4 * grey + 0.6 * np.array(MERGED_COLOUR), marked)
        marked[_outline(merged[..., 0])] = OUTLINE_COLOUR
    return marked.astype(np.uint8)


def averaged(pictures: Pixels, source: ArrayLike, positions: Indices) -> Pixels:
    """(F, H, W, 3): each patch replaced by the mean of all that ended in the same token, as in the paper's Fig. 22."""
    ended = np.asarray(source)[positions].reshape(-1)
    count, rows, columns = positions.shape
    tiles = pictures.reshape(count, rows, pictures.shape[1] // rows, columns, -1, 3).swapaxes(2, 3)
    flat = tiles.reshape(len(ended), -1).astype(np.float64)
    _, group, size = np.unique(ended, return_inverse=True, return_counts=True)
    total = np.zeros((len(size), flat.shape[1]))
    np.add.at(total, group, flat)
    mean = np.where((ended < 0)[:, None], flat, (total / size[:, None])[group])
    return mean.round().astype(np.uint8).reshape(tiles.shape).swapaxes(2, 3).reshape(pictures.shape)


def kept_patches(
    frames: ArrayLike,
    slot: ArrayLike,
    frame: ArrayLike,
    source: ArrayLike,
    grid: tuple[int, int],
    marker: ArrayLike | None,
    path: str | Path,
    *,
    title: str = "",
    times: Sequence[float] | None = None,
    show: Show = "marks",
    most: int = 16,
) -> Path:
    """A contact sheet of one arm: its frames in time order, each patch kept, merged or dropped.

    frames: (F, H, W, 3) uint8, one per frame of the layout. slot, frame, marker, source: (N,), see `patch_positions`
    and `patch_states`. times: seconds, per frame. show: see `render_frame`. most: of more frames, so many are chosen
    evenly. Raises LayoutError where frames, layout and grid do not fit.
    """
    pictures, positions = _prepared(frames, slot, frame, grid, marker)
    states = patch_states(source, positions)
    drawn = averaged(pictures, source, positions) if show == "average" else pictures
    shown = _chosen(len(pictures), most)
    columns = min(len(shown), 4)
    sheet = Sheet(pictures.shape[1:3], -(-len(shown) // columns), columns)
    for number, i in enumerate(shown):
        caption = f"{_caption(i, times)} · {_share(states[i], KEPT)} kept"
        sheet.place(render_frame(drawn[i], states[i], show), caption, *divmod(number, columns))
    return sheet.save(path, title or "What became of each patch", _counts(states), LEGENDS[show])


def comparison_sheet(
    frames: ArrayLike,
    slot: ArrayLike,
    frame: ArrayLike,
    sources: Mapping[str, ArrayLike],
    grid: tuple[int, int],
    marker: ArrayLike | None,
    path: str | Path,
    *,
    title: str = "",
    times: Sequence[float] | None = None,
    show: Show = "marks",
    most: int = 6,
) -> Path:
    """The same frames under several arms: a row per arm, the input on top. Arguments as for `kept_patches`."""
    pictures, positions = _prepared(frames, slot, frame, grid, marker)
    shown = _chosen(len(pictures), most)
    sheet = Sheet(pictures.shape[1:3], len(sources) + 1, len(shown), side=SIDE)
    sheet.name(0, "input", f"{positions.size:,} patches")
    for column, i in enumerate(shown):
        sheet.place(pictures[i], _caption(i, times), 0, column)
    for row, (name, source) in enumerate(sources.items(), start=1):
        states = patch_states(source, positions)
        drawn = averaged(pictures, source, positions) if show == "average" else pictures
        sheet.name(row, name, _counts(states).replace(" · ", "\n"))
        for column, i in enumerate(shown):
            sheet.place(render_frame(drawn[i], states[i], show), f"{_share(states[i], KEPT)} kept", row, column)
    return sheet.save(path, title or "What became of each patch", "", LEGENDS[show])


def _prepared(
    frames: ArrayLike, slot: ArrayLike, frame: ArrayLike, grid: tuple[int, int], marker: ArrayLike | None
) -> tuple[Pixels, Indices]:
    """The frames, about THUMB pixels wide and of sides that the grid divides, and the positions of their patches."""
    pictures = np.asarray(frames)
    if pictures.ndim != 4 or pictures.shape[3] != 3 or pictures.dtype != np.uint8:
        raise LayoutError(f"frames must be (F, H, W, 3) uint8, got {pictures.shape} {pictures.dtype}")
    positions = patch_positions(slot, frame, grid, marker)
    if len(positions) != len(pictures):
        raise LayoutError(f"the layout has {len(positions)} frames with patches, but {len(pictures)} frames were given")
    height, width = pictures.shape[1:3]
    scale = THUMB / width if width > THUMB else max(1, THUMB // width)
    rows, columns = grid
    size = (max(1, round(width * scale / columns)) * columns, max(1, round(height * scale / rows)) * rows)
    if size == (width, height):
        return pictures, positions
    way = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    return np.stack([np.asarray(Image.fromarray(picture).resize(size, way)) for picture in pictures]), positions


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of `mask` (H, W) with a side neighbour outside of it."""
    wide = np.pad(mask, 1)
    return mask & ~(wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:])


def _chosen(count: int, most: int) -> list[int]:
    """All of `count` frames, or `most` of them at even distances with the first and the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def _caption(index: int, times: Sequence[float] | None) -> str:
    return f"frame {index}" + ("" if times is None else f" · {times[index]:.2f} s")


def _share(states: Indices, state: int) -> str:
    return f"{np.mean(states == state):.0%}"


def _counts(states: Indices) -> str:
    names = ((KEPT, "kept"), (MERGED, "merged"), (DROPPED, "dropped"))
    return " · ".join(f"{np.sum(states == state):,} {name} ({_share(states, state)})" for state, name in names)
