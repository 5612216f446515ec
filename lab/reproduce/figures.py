"""Figs. 7, 10 and 12: accuracy against FLOPs, against length, and by position and length.

Colours are of the Okabe-Ito set; curves also differ in line style and marker, and heat maps print their numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lab.reproduce.plan import CONTROLS, METHODS
from tokenreduce.compare.arms import BASELINE
from tokenreduce.media.pictures import COLOURS, STYLES

MARKERS = "osD^vP"
NAMES = {
    "dense": "dense",
    "streaming_llm": "StreamingLLM",
    "fastv": "FastV",
    "framefusion": "FrameFusion",
    "framefusion_official": "FrameFusion, released choices",
    "random": "random tokens",
    "random_after_two": "random tokens after two dense layers",
    "random_after_one": "random tokens after one dense layer",
    "fastv_after_one": "FastV with K = 1",
    "uniform_frames": "fewer frames",
    "prune_then_merge": "prune then merge",
    "merge_then_prune": "merge then prune",
    "cascaded": "FrameFusion (cascaded)",
    "noncascaded_merge": "non-cascaded merging",
}
ORDER = (BASELINE, *METHODS, *CONTROLS)


def tradeoff(panels: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Fig. 7: one curve per method over its budgets, with 95 % Wilson intervals; dense as a line."""
    figure = Figure(figsize=(5.2 * len(panels), 4.4), dpi=130, layout="constrained")
    for axis, panel in zip(np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels, strict=True):
        arms = {entry["arm"]: entry for entry in panel["arms"] if entry["examples"]}
        dense = arms[BASELINE]
        axis.axhline(100 * dense["accuracy"], color="#777777", lw=1)
        axis.axhspan(*(100 * end for end in dense["interval"]), color="#777777", alpha=0.15, lw=0)
        axis.plot(1, 100 * dense["accuracy"], "X", color="#000000", ms=8, label=NAMES[BASELINE])
        for method in (*METHODS, *CONTROLS):
            own = sorted(
                (entry["relative_flops"], entry) for name, entry in arms.items() if name.partition("@")[0] == method
            )
            _curve(axis, [cost for cost, _ in own], [entry for _, entry in own], method)
        _finish(axis, panel["label"], "FLOPs of the prefill, relative to dense", "accuracy, %")
    _legend(figure)
    figure.savefig(path)


def lengths(panels: Sequence[Mapping[str, Any]], frames: Sequence[int], path: Path) -> None:
    """Fig. 10: accuracy over the number of frames, one curve per method, with 95 % Wilson intervals."""
    figure = Figure(figsize=(6.6, 4.4), dpi=130, layout="constrained")
    axis = figure.subplots()
    for method in ORDER:
        name = method if method == BASELINE else f"{method}@0.3"
        entries = [next(entry for entry in panel["arms"] if entry["arm"] == name) for panel in panels]
        if all(entry["examples"] for entry in entries):
            _curve(axis, list(range(len(frames))), entries, method, shift=0.02 * (ORDER.index(method) - 2.5))
    axis.set_xticks(range(len(frames)), [str(count) for count in frames])
    _finish(axis, "", "frames", "accuracy, %")
    _legend(figure)
    figure.savefig(path)


def needle_grid(panels: Sequence[Mapping[str, Any]], frames: Sequence[int], path: Path) -> None:
    """Fig. 12: one heat map per method, position of the needle across and length of the video down."""
    figure = Figure(figsize=(10.5, 5.4), dpi=130, layout="constrained")
    places = sorted({cell["position"] for panel in panels for cells in panel["grid"].values() for cell in cells})
    for axis, method in zip(figure.subplots(2, 3).flat, ORDER, strict=True):
        name = method if method == BASELINE else f"{method}@0.3"
        found = [{cell["position"]: cell for cell in panel["grid"].get(name, [])} for panel in panels]
        values = np.array([[_percent(cells.get(place)) for place in places] for cells in found]).reshape(len(found), -1)
        image = axis.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            if not np.isnan(value):
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", color="black" if value > 55 else "white")
        axis.set_xticks(range(len(places)), [f"{place:g}" for place in places])
        axis.set_yticks(range(len(frames)), [str(count) for count in frames])
        axis.set(title=NAMES[method], xlabel="position, 0 first frame … 1 last", ylabel="frames")
        figure.colorbar(image, ax=axis, label="accuracy, %")
    figure.savefig(path)


def _percent(cell: Mapping[str, Any] | None) -> float:
    return np.nan if cell is None else 100 * cell["right"] / cell["examples"]


def _curve(
    axis: Any, x: Sequence[float], entries: Sequence[Mapping[str, Any]], method: str, shift: float = 0.0
) -> None:
    if not entries:
        return
    number = ORDER.index(method)
    y = [100 * entry["accuracy"] for entry in entries]
    reach = [
        [100 * (entry["accuracy"] - entry["interval"][0]) for entry in entries],
        [100 * (entry["interval"][1] - entry["accuracy"]) for entry in entries],
    ]
    axis.errorbar(
        [place + shift for place in x],
        y,
        yerr=np.maximum(reach, 0),
        color=COLOURS[number],
        ls=STYLES[number % len(STYLES)],
        marker=MARKERS[number],
        label=NAMES[method],
        capsize=3,
        elinewidth=1,
    )


def _finish(axis: Any, title: str, x: str, y: str) -> None:
    axis.set(title=title, xlabel=x, ylabel=y, ylim=(0, 104))
    axis.grid(color="#dddddd", lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
