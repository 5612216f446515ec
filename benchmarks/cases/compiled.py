"""torch.compile with a pipeline attached, against the same models uncompiled."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import HIDDEN, Options, decoder, paired_ratio, spread, summary, table, take_turns, video
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import tokenreduce as tr

TITLE = f"torch.compile: layers of width {HIDDEN}, C = 0.3"
PIPELINES = ("fastv", "framefusion_equal", "streaming_llm")


def measure(options: Options) -> dict[str, Any]:
    """Dense and with each pipeline, eager and compiled by inductor; the weights are shared."""
    layers, frames, repeats = (8, 4, 2) if options.quick else (24, 6, 2)
    names = ("dense", "fastv") if options.quick else ("dense", *PIPELINES)
    weights = decoder(layers)
    embeds, layout = video(frames)
    runs: dict[str, tr.Run] = {}
    arms: dict[str, Callable[[], torch.Tensor]] = {}
    for name in names:
        for how in ("eager", "compiled"):
            arm = f"{name}, {how}"
            model = _twin(weights)
            if name != "dense":
                runs[arm] = tr.reduce(model, name, budget=0.3, layout=layout)
            if how == "compiled":
                model.compile()
            arms[arm] = _prefill(model, embeds)
    first: dict[str, dict[str, Any]] = {}
    logits: dict[str, torch.Tensor] = {}
    with fresh_cache():  # Seconds to compile are those of a first time.
        for arm, call in arms.items():
            counters.clear()
            started = time.perf_counter()
            logits[arm] = call()
            first[arm] = {
                "first_seconds": time.perf_counter() - started,
                "graphs": counters["stats"]["unique_graphs"],
                "breaks": sum(counters["graph_break"].values()),
            }
            print(f"  {arm}: first call {first[arm]['first_seconds']:.1f} s", flush=True)
        take_turns(arms, 0)  # The first graph of an arm may not be its last.
        counters.clear()
        seconds = take_turns(arms, repeats, warmup=0)
        recompiled = counters["stats"]["unique_graphs"]
    found = {}
    for arm, times in seconds.items():
        name, _, how = arm.partition(", ")
        eager = f"{name}, eager"
        found[arm] = first[arm] | {
            "seconds": summary(times),
            "to_dense": paired_ratio(seconds[f"dense, {how}"], times),
            "to_eager": paired_ratio(seconds[eager], times),
            "logits": float((logits[arm] - logits[eager]).abs().max()),
            "same_tokens": torch.equal(runs[arm].trace.source, runs[eager].trace.source) if arm in runs else None,
        }
    for run in runs.values():
        run.detach()
    return {"layers": layers, "tokens": embeds.shape[1], "arms": found, "recompiled": recompiled}


def _twin(weights: Any) -> Any:
    """A model with the very weights of another."""
    with torch.device("meta"):
        model = type(weights)(copy.deepcopy(weights.config))
    model.load_state_dict(weights.state_dict(), assign=True)
    model.model.rotary_emb = weights.model.rotary_emb  # Its tables are no parameters.
    return model.eval()


def _prefill(model: Any, embeds: torch.Tensor) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        with torch.inference_mode():
            return model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).logits  # type: ignore[no-any-return]

    return call


def section(data: dict[str, Any], docs: Path) -> list[str]:
    """One table."""
    rows = [
        (
            arm, f"{row['seconds']['median']:.2f}", f"{spread(row['to_dense'])}×", f"{spread(row['to_eager'])}×",
            f"{row['first_seconds'] - row['seconds']['median']:.0f}" if arm.endswith("compiled") else "–",
            row["graphs"] or "–", row["breaks"] if row["graphs"] else "–",
            f"{row['logits']:.1e}" if arm.endswith("compiled") else "–",
            {True: "yes", False: "no", None: "–"}[row["same_tokens"]], row["seconds"]["runs"],
        )
        for arm, row in data["arms"].items()
    ]  # fmt: skip
    columns = (
        "arm", "prefill, s", "over dense alike", "over eager", "s to compile", "graphs", "breaks", "logits differ by",
        "tokens as eager", "turns",
    )  # fmt: skip
    return [
        f"Prefill of {data['tokens']} tokens through {data['layers']} layers; `model.compile()` with inductor, its cache empty.",
        "Seconds to compile are the first call less a later one. All layers are one graph; breaks are where the engine begins",
        f"and ends, around the decoder. Graphs made anew during the timed turns: {data['recompiled']}.",
        "",
        *table(columns, rows),
    ]
