"""Four different videos in one batch: equal counts need no mask, ragged ones no longer either."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from harness import HIDDEN, Options, decoder, paired_ratio, spread, summary, table, take_turns, video

import tokenreduce as tr
from tokenreduce.engine.forward.state import state as engine

LAYERS, ROWS = 8, 4
TITLE = f"Batch of {ROWS}: {LAYERS} layers of width {HIDDEN}, C = 0.3"


def measure(options: Options) -> dict[str, Any]:
    """Batches of equally long videos, and of videos of 3, 6, 9 and 12 frames with left padding."""
    equal, padded, turns = ([12] * ROWS, [3, 6, 9, 12], 3) if not options.quick else ([4] * ROWS, [3, 4, 5, 6], 2)
    if options.frames:
        equal, padded = [max(options.frames)] * len(options.frames), list(options.frames)
    model = decoder(options.layers or LAYERS, options.hidden or HIDDEN)
    sizes = {"layers": model.config.num_hidden_layers, "hidden": model.config.hidden_size}
    return {**sizes, "equal": _batch(model, equal, turns), "padded": _batch(model, padded, turns)}


def _batch(model: Any, frames: list[int], repeats: int) -> dict[str, Any]:
    rows = [video(count, seed, hidden=model.config.hidden_size) for seed, count in enumerate(frames)]
    longest = max(embeds.shape[1] for embeds, _ in rows)
    together = torch.cat([_left(embeds, longest, 1, 0.0) for embeds, _ in rows])
    mask = torch.cat([_left(torch.ones(1, e.shape[1], dtype=torch.long), longest, 1, 0) for e, _ in rows])
    layout = tr.TokenLayout(
        *(torch.cat([_left(getattr(lay, name), longest, 1, -1) for _, lay in rows]) for name in ("slot", "frame"))
    )
    ragged: dict[str, list[list[int]]] = {}

    def dense() -> None:
        with torch.inference_mode():
            model(inputs_embeds=together, attention_mask=mask, logits_to_keep=1)

    def batched(name: str, label: str) -> None:
        with tr.reduce(model, name, layout=layout) as run:
            dense()
            ragged[label] = [layer.tokens.tolist() for layer in run.trace.layers]

    def masked() -> None:
        # What it would be with the padding masks that transformers makes for SDPA.
        with patch.object(engine, "_plain", return_value=False):
            batched("framefusion", "framefusion, with masks")

    def one_by_one() -> None:
        for embeds, lay in rows:
            with tr.reduce(model, "framefusion", layout=lay), torch.inference_mode():
                model(inputs_embeds=embeds, logits_to_keep=1)

    arms = {
        "dense": dense,
        "framefusion, one by one": one_by_one,
        "framefusion, with masks": masked,
        "framefusion, no mask": lambda: batched("framefusion", "framefusion, no mask"),
        "framefusion_equal": lambda: batched("framefusion_equal", "framefusion_equal"),
        "fastv": lambda: batched("fastv", "fastv"),
    }
    seconds = take_turns(arms, repeats)
    found = {
        name: {
            "seconds": summary(times),
            "to_dense": paired_ratio(seconds["dense"], times),
            "to_masked": paired_ratio(seconds["framefusion, with masks"], times),
            "equal_layers": sum(len(set(layer)) == 1 for layer in ragged[name]) if name in ragged else None,
        }
        for name, times in seconds.items()
    }
    for name, row in found.items():
        print(f"  {frames} frames, {name}: {spread(row['to_dense'])}× dense", flush=True)
    return {"frames": frames, "arms": found}


def _left(x: torch.Tensor, longest: int, axis: int, value: float) -> torch.Tensor:
    """x padded on the left along `axis`."""
    missing = longest - x.shape[axis]
    shape = (*x.shape[:axis], missing, *x.shape[axis + 1 :])
    return torch.cat([x.new_full(shape, value), x], axis)


def section(data: dict[str, Any], docs: Path) -> list[str]:
    """One table for each batch."""
    lines = [
        "Four different videos. `with masks` is the same engine made to use a padding mask wherever rows differ in length;",
        "without it, the attention of a row runs over the row's own tokens. `framefusion_equal` merges a fixed share, so rows",
        "of one length stay alike.",
    ]
    for title, batch in (("Equally long videos", data["equal"]), ("Videos of different length", data["padded"])):
        cells = [
            (
                name, f"{arm['seconds']['median']:.2f}", f"{spread(arm['to_dense'])}×", f"{spread(arm['to_masked'])}×",
                "–" if arm["equal_layers"] is None else f"{arm['equal_layers']} of {data['layers']}", arm["to_dense"]["runs"],
            )
            for name, arm in batch["arms"].items()
        ]  # fmt: skip
        columns = ("arm", "s", "speed-up over dense", "over `with masks`", "layers of equal counts", "turns")
        lines += ["", f"{title} ({', '.join(map(str, batch['frames']))} frames):", "", *table(columns, cells)]
    return lines
