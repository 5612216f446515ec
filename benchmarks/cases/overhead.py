"""What an attached pipeline costs where it gains nothing: an empty one, one that keeps all, and a decode step."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from harness import HIDDEN, Options, Row, decoder, spread, summary, table, take_turns, video
from transformers import DynamicCache

import tokenreduce as tr

LAYERS = 24
NARROW = 128
"""Width of the decoder whose steps are timed: what the engine does in a step is Python, and a wide one's noise would hide it."""
BLOCK, COLD = 40, 5
"""Steps of a block that count, and steps before them."""
TITLE = f"Nothing for nothing: {LAYERS} layers of width {HIDDEN}"
EMPTY = {"name": "empty", "stages": []}
KEEP_ALL = {"name": "keep all", "budget": 1.0, "stages": [{"strategy": "uniform_frames"}]}
REDUCED = {"name": "30 % kept", "budget": 0.3, "stages": [{"strategy": "fastv"}]}
READ_ALL = {"name": "keep all, attention read", "budget": 1.0, "stages": [{"strategy": "fastv"}]}


def measure(options: Options) -> dict[str, Any]:
    """Prefill and decode steps, attached and not, step by step in turns on one model."""
    model, narrow = decoder(LAYERS), decoder(LAYERS, NARROW)
    embeds, layout = video(2 if options.quick else 4)
    return {
        "layers": LAYERS,
        "tokens": embeds.shape[1],
        "hooks": {pipeline["name"]: _hooks(model, pipeline, layout) for pipeline in (EMPTY, KEEP_ALL)},
        "prefill": [
            _prefill(model, narrow, embeds, layout, p, 6 if options.quick else 40) for p in (EMPTY, KEEP_ALL, READ_ALL)
        ],
        "decode": [
            _decode(narrow, embeds[..., :NARROW], layout, p, 4 if options.quick else 30)
            for p in (EMPTY, KEEP_ALL, READ_ALL, REDUCED)
        ],
    }


def _hooks(model: torch.nn.Module, pipeline: Any, layout: tr.TokenLayout) -> int:
    """Hooks that the pipeline puts on the model between forwards."""

    def count() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    before = count()
    with tr.reduce(model, pipeline, layout=layout):
        return count() - before


def _prefill(wide: Any, narrow: Any, embeds: torch.Tensor, layout: tr.TokenLayout, pipeline: Any, turns: int) -> Row:
    """What attaching, a prefill and detaching take more on the narrow decoder, and what part of the wide one's prefill that is.

    On the wide one itself the machine's noise is several times as much.
    """

    def dense(model: Any = narrow, x: torch.Tensor = embeds[..., :NARROW]) -> None:
        with torch.inference_mode():
            model(inputs_embeds=x, logits_to_keep=1)

    def attached() -> None:
        with tr.reduce(narrow, pipeline, layout=layout):
            dense()

    seconds = take_turns({"dense": dense, "attached": attached}, turns)
    extra = summary([1e3 * (a - d) for a, d in zip(seconds["attached"], seconds["dense"], strict=True)])
    whole = summary(take_turns({"dense": lambda: dense(wide, embeds)}, 3)["dense"])
    share = extra["median"] / (1e3 * whole["median"])
    print(f"  prefill, {pipeline['name']}: {extra['median']:+.2f} ms, {share:.2%} of the wide one's", flush=True)
    return {"pipeline": pipeline["name"], "extra_ms": extra, "share": share, "dense": whole}


def _decode(model: Any, embeds: torch.Tensor, layout: tr.TokenLayout, pipeline: Any, turns: int) -> Row:
    """Blocks of steps in turns; each step takes its token back, so that all are alike.

    Only the step itself is in the time. The dense cache has what the attached one holds, token for token.
    """
    token = torch.zeros(1, 1, dtype=torch.long)
    seconds: dict[str, list[float]] = {"dense": [], "attached": []}

    def block(cache: DynamicCache) -> float:
        """Median of a block's steps without the first ones, whose code Python has just seen change."""
        took = []
        for _ in range(BLOCK + COLD):
            started = time.perf_counter()
            model(input_ids=token, past_key_values=cache)
            took.append(time.perf_counter() - started)
            cache.crop(-1)
        return statistics.median(took[COLD:])

    with torch.inference_mode():
        attached, dense = DynamicCache(config=model.config), DynamicCache(config=model.config)
        with tr.reduce(model, pipeline, layout=layout):
            model(inputs_embeds=embeds, past_key_values=attached, logits_to_keep=1)
        for number, layer in enumerate(attached.layers):
            dense.update(layer.keys.clone(), layer.values.clone(), number)
        for turn in range(turns):
            for name in ("dense", "attached")[:: 1 if turn % 2 else -1]:
                if name == "dense":
                    seconds[name].append(block(dense))
                    continue
                with tr.reduce(model, pipeline, layout=layout) as run:
                    run._fresh = False  # Its prompt has been prefilled already.
                    seconds[name].append(block(attached))
    extra = [1e3 * (a - d) for a, d in zip(seconds["attached"], seconds["dense"], strict=True)]
    print(f"  decode, {pipeline['name']}: {summary(extra)['median']:+.3f} ms a step", flush=True)
    return {"pipeline": pipeline["name"], "extra_ms": summary(extra), "dense": summary(seconds["dense"])}


def section(data: dict[str, Any], docs: Path) -> list[str]:
    """Three short tables."""
    decode = [
        (r["pipeline"], f"{1e3 * r['dense']['median']:.2f}", f"{r['extra_ms']['median']:+.3f}", r["extra_ms"]["runs"])
        for r in data["decode"]
    ]
    prefill = [
        (
            r["pipeline"],
            spread(r["extra_ms"], 1),
            f"{r['dense']['median']:.2f}",
            f"{r['share']:.2%}",
            r["extra_ms"]["runs"],
        )
        for r in data["prefill"]
    ]
    hooks = ", ".join(f"{name}: {count}" for name, count in data["hooks"].items())
    return [
        f"{data['tokens']:,} tokens. Hooks on the model between two forwards: {hooks}. The engine's work in a step, and in a",
        "prefill all but the reading of attention, is Python that does not depend on the width, so it is measured where the",
        f"noise is least: at width {NARROW}. Attaching and detaching is inside the prefill's time and outside of the",
        "step's; the step's dense cache holds what the attached one does.",
        "",
        *table(
            ("pipeline", "ms more in a prefill", f"dense prefill s, width {HIDDEN}", "share of it", "turns"), prefill
        ),
        "",
        *table(
            (
                f"pipeline, width {NARROW}",
                "dense decode step ms",
                "attached, ms more (median of pairs)",
                "pairs of blocks",
            ),
            decode,
        ),
    ]
