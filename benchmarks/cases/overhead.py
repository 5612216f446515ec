"""What an attached pipeline costs where it gains nothing: an empty one, one that keeps all, and a decode step."""

from __future__ import annotations

import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from harness import HIDDEN, Options, Row, decoder, median_interval, spread, summary, table, take_turns, video
from transformers import DynamicCache

import tokenreduce as tr

LAYERS = 24
NARROW = 128
"""Width of the decoder whose steps are timed: what the engine does in a step is Python, and a wide one's noise would hide it."""
STEPS, COLD = 40, 10
"""Steps of a round that count, and steps before them: Python has just seen its code change."""
TITLE = f"Nothing for nothing: {LAYERS} layers of width {HIDDEN}"
EMPTY = {"name": "empty", "stages": []}
KEEP_ALL = {"name": "keep all", "budget": 1.0, "stages": [{"strategy": "uniform_frames"}]}
REDUCED = {"name": "30 % kept", "budget": 0.3, "stages": [{"strategy": "fastv"}]}
READ_ALL = {"name": "keep all, attention read", "budget": 1.0, "stages": [{"strategy": "fastv"}]}


def measure(options: Options) -> dict[str, Any]:
    """Prefill and decode steps, attached and not, in turns."""
    layers, hidden = options.layers or LAYERS, options.hidden or HIDDEN
    model, narrow = decoder(layers, hidden), decoder(layers, NARROW)
    embeds, layout = video((*options.frames, 2 if options.quick else 4)[0], hidden=hidden)
    short, frame = video(1, hidden=hidden)
    return {
        "layers": layers,
        "hidden": hidden,
        "tokens": embeds.shape[1],
        "decode_tokens": short.shape[1],
        "hooks": {pipeline["name"]: _hooks(model, pipeline, layout) for pipeline in (EMPTY, KEEP_ALL)},
        "prefill": [
            _prefill(model, narrow, embeds, layout, p, 6 if options.quick else 40) for p in (EMPTY, KEEP_ALL, READ_ALL)
        ],
        "decode": [
            _decode(narrow, short[..., :NARROW], frame, p, 4 if options.quick else 60)
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


def _decode(model: Any, embeds: torch.Tensor, layout: tr.TokenLayout, pipeline: Any, rounds: int) -> Row:
    """Rounds in which two models with the same weights, one attached and one not, take turns step by step.

    Where its tensors lie in memory makes one of them faster by more than what is to be measured; so both are attached in turns,
    caches are made anew, and what counts is the median of each round. Each step takes its token back, outside of the time, so
    that all are alike. The dense cache has what the attached one holds, token for token.
    """
    models = [model, copy.deepcopy(model)]
    token = torch.zeros(1, 1, dtype=torch.long)
    extra, plain = [], []

    def step(subject: Any, cache: DynamicCache) -> float:
        started = time.perf_counter()
        subject(input_ids=token, past_key_values=cache)
        took = time.perf_counter() - started
        cache.crop(-1)
        return took

    for number in range(rounds):
        subject, other = models[number % 2], models[1 - number % 2]
        attached, dense = DynamicCache(config=model.config), DynamicCache(config=model.config)
        pairs = []
        with torch.inference_mode(), tr.reduce(subject, pipeline, layout=layout):
            subject(inputs_embeds=embeds, past_key_values=attached, logits_to_keep=1)
            for place, layer in enumerate(attached.layers):
                dense.update(layer.keys.clone(), layer.values.clone(), place)
            for turn in range(STEPS + COLD):
                if turn % 2:
                    pairs.append((step(subject, attached), step(other, dense)))
                else:
                    pairs.append((step(other, dense), step(subject, attached))[::-1])
        extra.append(statistics.median(1e3 * (a - d) for a, d in pairs[COLD:]))
        plain.append(statistics.median(d for _, d in pairs[COLD:]))
    row = {
        "pipeline": pipeline["name"],
        "extra_ms": summary(extra) | {"interval": median_interval(extra)},
        "dense": summary(plain),
    }
    low, high = row["extra_ms"]["interval"]
    print(
        f"  decode, {row['pipeline']}: {row['extra_ms']['median']:+.3f} ms a step ({low:+.3f} to {high:+.3f})",
        flush=True,
    )
    return row


def section(data: dict[str, Any], docs: Path) -> list[str]:
    """Three short tables."""
    decode = [
        (
            r["pipeline"],
            f"{1e3 * r['dense']['median']:.2f}",
            "{:+.3f} ({:+.3f} to {:+.3f})".format(r["extra_ms"]["median"], *r["extra_ms"]["interval"]),
            r["extra_ms"]["runs"],
        )
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
        f"step's. Steps come after {data['decode_tokens']} tokens. Steps of two models with the same weights take turns,",
        f"{STEPS} in a round, and the models change places from round to round; the dense one's cache holds what the",
        "attached one's does.",
        "",
        *table(
            ("pipeline", "ms more in a prefill", f"dense prefill s, width {data['hidden']}", "share of it", "turns"),
            prefill,
        ),
        "",
        *table(
            (
                f"pipeline, width {NARROW}",
                "dense decode step ms",
                "attached, ms more: median of rounds (its 95 % interval)",
                "rounds",
            ),
            decode,
        ),
    ]
