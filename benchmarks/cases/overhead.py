"""What an attached pipeline costs where it gains nothing: an empty one, one that keeps all, and a decode step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from harness import HIDDEN, Options, Row, decoder, paired_ratio, spread, summary, table, take_turns, video
from transformers import DynamicCache

import tokenreduce as tr

LAYERS = 24
NARROW = 128
"""Width of the decoder whose steps are timed: what the engine does in a step is Python, and a wide one's noise would hide it."""
TITLE = f"Nothing for nothing: {LAYERS} layers of width {HIDDEN}"
EMPTY = {"name": "empty", "stages": []}
KEEP_ALL = {"name": "keep all", "budget": 1.0, "stages": [{"strategy": "uniform_frames"}]}
READ_ALL = {"name": "keep all, attention read", "budget": 1.0, "stages": [{"strategy": "fastv"}]}


def measure(options: Options) -> dict[str, Any]:
    """Prefill and decode steps, attached and not, step by step in turns on one model."""
    model, narrow = decoder(LAYERS), decoder(LAYERS, NARROW)
    embeds, layout = video(2 if options.quick else 4)
    return {
        "layers": LAYERS,
        "tokens": embeds.shape[1],
        "hooks": {pipeline["name"]: _hooks(model, pipeline, layout) for pipeline in (EMPTY, KEEP_ALL)},
        "prefill": [_prefill(model, embeds, layout, p, 2 if options.quick else 4) for p in (EMPTY, KEEP_ALL, READ_ALL)],
        "decode": [
            _decode(narrow, embeds[..., :NARROW], layout, p, 20 if options.quick else 150)
            for p in (EMPTY, KEEP_ALL, READ_ALL)
        ],
    }


def _hooks(model: torch.nn.Module, pipeline: Any, layout: tr.TokenLayout) -> int:
    """Hooks that the pipeline puts on the model between forwards."""

    def count() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    before = count()
    with tr.reduce(model, pipeline, layout=layout):
        return count() - before


def _prefill(model: Any, embeds: torch.Tensor, layout: tr.TokenLayout, pipeline: Any, repeats: int) -> Row:

    def forward() -> None:
        with torch.inference_mode():
            model(inputs_embeds=embeds, logits_to_keep=1)

    def attached() -> None:
        with tr.reduce(model, pipeline, layout=layout):
            forward()

    seconds = take_turns({"dense": forward, "attached": attached}, repeats)
    ratio = paired_ratio(seconds["attached"], seconds["dense"])
    print(f"  prefill, {pipeline['name']}: {spread(ratio, 4)} of dense", flush=True)
    return {"pipeline": pipeline["name"], "ratio": ratio, "dense": summary(seconds["dense"])}


def _decode(model: Any, embeds: torch.Tensor, layout: tr.TokenLayout, pipeline: Any, steps: int) -> Row:
    """Each step takes its token back, so that all steps are alike; attaching, detaching and that are not in the time."""
    caches: dict[str, DynamicCache] = {}
    token = torch.zeros(1, 1, dtype=torch.long)
    seconds: dict[str, list[float]] = {"dense": [], "attached": []}

    def prefill(name: str) -> None:
        caches[name] = DynamicCache(config=model.config)
        model(inputs_embeds=embeds, past_key_values=caches[name], logits_to_keep=1)

    def step(name: str) -> float:
        started = time.perf_counter()
        model(input_ids=token, past_key_values=caches[name])
        took = time.perf_counter() - started
        caches[name].crop(-1)
        return took

    def attached_step() -> float:
        with tr.reduce(model, pipeline, layout=layout) as run:
            run._fresh = False  # Its prompt has been prefilled already.
            step("attached")
            return step("attached")

    with torch.inference_mode():
        prefill("dense")
        with tr.reduce(model, pipeline, layout=layout):
            prefill("attached")
        for _ in range(steps):
            # The second of two equal steps: the first one after attaching runs on cold Python caches.
            step("dense")
            seconds["dense"].append(step("dense"))
            seconds["attached"].append(attached_step())
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
        (r["pipeline"], f"{r['dense']['median']:.2f}", spread(r["ratio"], 4), r["ratio"]["runs"])
        for r in data["prefill"]
    ]
    hooks = ", ".join(f"{name}: {count}" for name, count in data["hooks"].items())
    return [
        f"{data['tokens']:,} tokens, all kept. Hooks on the model between two forwards: {hooks}. Attaching and detaching is",
        "inside the prefill's time and outside of the decode step's.",
        "",
        *table(("pipeline", "dense prefill s", "attached ÷ dense", "turns"), prefill),
        "",
        *table(
            (f"pipeline, width {NARROW}", "dense decode step ms", "attached, ms more (median of pairs)", "steps"),
            decode,
        ),
    ]
