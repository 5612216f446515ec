"""Measured against FLOP-predicted speed-up of the prefill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from harness import HIDDEN, Options, Row, decoder, paired_ratio, spread, summary, table, take_turns, video
from matplotlib.figure import Figure

import tokenreduce as tr
from tokenreduce.errors import BudgetError
from tokenreduce.planning.cost import DecoderShape, prefill_flops

LAYERS = 24
TITLE = f"Prefill: {LAYERS} layers of width {HIDDEN}, video-like embeddings"
PIPELINES = ("framefusion", "framefusion_official", "fastv")
COLOURS = ("#0072B2", "#009E73", "#D55E00")
Setting = tuple[int, torch.dtype, tuple[float, ...], int]
SETTINGS: tuple[Setting, ...] = ((20, torch.float32, (0.1, 0.3, 0.5, 0.7), 3), (40, torch.float32, (0.3,), 2))
"""Frames, dtype, budgets, turns."""


def measure(options: Options) -> dict[str, Any]:
    """Dense and each pipeline in turns, at each setting."""
    settings: tuple[Setting, ...] = ((6, torch.float32, (0.3, 0.5), 2),) if options.quick else SETTINGS
    if options.frames:
        settings = tuple((frames, torch.float32, settings[0][2], settings[0][3]) for frames in options.frames)
    return measured(options, settings)


def measured(options: Options, settings: tuple[Setting, ...], names: tuple[str, ...] = PIPELINES) -> dict[str, Any]:
    """The rows of all settings, and the sizes of the decoder."""
    layers, hidden = options.layers or LAYERS, options.hidden or HIDDEN
    rows = [row for setting in settings for row in setting_rows(layers, hidden, *setting, names)]
    return {"layers": layers, "hidden": hidden, "rows": rows}


def setting_rows(
    layers: int,
    hidden: int,
    frames: int,
    dtype: torch.dtype,
    budgets: tuple[float, ...],
    repeats: int,
    names: tuple[str, ...],
) -> list[Row]:
    """A row for each pipeline and budget. The warm-up is a short video: a turn takes minutes."""
    model = decoder(layers, hidden, dtype)
    traces: dict[tuple[str, float], tr.Trace] = {}
    long, short = (video(count, dtype=dtype, hidden=hidden) for count in (frames, 2))
    embeds, layout = short

    def prefill() -> None:
        with torch.inference_mode():
            model(inputs_embeds=embeds, logits_to_keep=1)

    def reduced(name: str, budget: float) -> None:
        with tr.reduce(model, name, budget=budget, layout=layout) as run:
            prefill()
            traces[name, budget] = run.trace

    arms = {
        (name, budget): (lambda name=name, b=budget: reduced(name, b))
        for budget in budgets
        for name in names
        if feasible(model, name, budget, long[1])
    }
    labelled = {"dense": prefill} | {f"{name} {budget}": arm for (name, budget), arm in arms.items()}
    for name, arm in labelled.items():
        if name == "dense" or name.endswith(f" {budgets[-1]}"):
            arm()
    embeds, layout = long
    seconds = take_turns(labelled, repeats, warmup=0)
    shape, n = DecoderShape.from_config(model.config), embeds.shape[1]
    rows = []
    for name, budget in arms:
        trace = traces[name, budget]
        attn = [int(layer.tokens) for layer in trace.layers]
        ffn = [int(layer.ffn_tokens) for layer in trace.layers]
        predicted = {
            form: prefill_flops(shape, [n] * layers, [n] * layers, form=form)
            / (prefill_flops(shape, attn, ffn, form=form) + trace.selector_flops)
            for form in ("causal", "exact")
        }
        measured = paired_ratio(seconds["dense"], seconds[f"{name} {budget}"])
        rows.append(
            {
                "tokens": n, "dtype": str(dtype).removeprefix("torch."), "budget": budget, "pipeline": name,
                "measured": measured, "predicted": predicted, "reached": measured["median"] / predicted["causal"],
                "attn": attn, "ffn": ffn, "selector_flops": trace.selector_flops,
                "dense_seconds": summary(seconds["dense"]), "seconds": summary(seconds[f"{name} {budget}"]),
            }
        )  # fmt: skip
        print(
            f"  N={n} {dtype} C={budget} {name}: {spread(measured)}×, {predicted['causal']:.2f}× predicted", flush=True
        )
    return rows


def feasible(model: Any, name: str, budget: float, layout: tr.TokenLayout) -> bool:
    """Whether the pipeline can meet the budget: few layers leave FastV, which begins with two dense ones, no room."""
    try:
        tr.reduce(model, name, budget=budget, layout=layout).detach()
    except BudgetError as error:
        print(f"  C={budget} {name} left out: {error}", flush=True)
        return False
    return True


def rows_table(data: dict[str, Any]) -> list[str]:
    """Measured and predicted, row by row."""
    cells = [
        (
            f"{row['tokens']:,}", row["dtype"], row["budget"], row["pipeline"], f"{row['dense_seconds']['median']:.1f}",
            f"{row['seconds']['median']:.1f}", f"{spread(row['measured'])}×", row["measured"]["runs"],
            f"{row['predicted']['causal']:.2f}×", f"**{row['reached']:.2f}**", f"{row['predicted']['exact']:.2f}×",
        )
        for row in data["rows"]
    ]  # fmt: skip
    columns = ("N", "dtype", "C", "pipeline", "dense s", "reduced s", "measured", "turns", "predicted")
    return table((*columns, "measured ÷ predicted", "full squares"), cells)


def section(data: dict[str, Any], docs: Path) -> list[str]:
    """The table, and speed-up against budget."""
    first = data["rows"][0]
    curve = [row for row in data["rows"] if (row["dtype"], row["tokens"]) == (first["dtype"], first["tokens"])]
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axis = figure.add_subplot()
    for colour, name in zip(COLOURS, PIPELINES, strict=True):
        points = sorted(
            (r["budget"], r["measured"]["median"], r["predicted"]["causal"]) for r in curve if r["pipeline"] == name
        )
        axis.plot([p[0] for p in points], [p[1] for p in points], "o-", color=colour, label=f"{name}, measured")
        axis.plot([p[0] for p in points], [p[2] for p in points], "x:", color=colour, label=f"{name}, predicted")
    axis.set(xlabel="relative token budget C", ylabel="prefill speed-up over dense", ylim=(0, None))
    axis.set_title(f"{data['layers']} layers, width {data['hidden']}, N = {first['tokens']:,}, {first['dtype']}")
    axis.grid(color="#dddddd")
    axis.legend(fontsize=8)
    figure.savefig(docs / "benchmarks_prefill.png")
    return [
        "The prediction is the ratio of FLOPs, with attention as causal kernels compute it (half of the square) and the",
        "selector's own FLOPs counted; `full squares` is what FlopCounterMode would say. The warm-up is a video of two frames.",
        "",
        *rows_table(data),
        "",
        "![Prefill speed-up against budget](benchmarks_prefill.png)",
    ]
