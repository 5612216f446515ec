"""Benchmarks: `python benchmarks/bench.py [CASE ...]`, or `make bench`.

Arms take turns within one run, after a warm-up; reported are medians, spread, and ratios of medians. Times are CPU seconds of
the process, which other load on the machine disturbs less than wall time. Every case writes a JSON file to
benchmarks/results/; `python benchmarks/report.py` turns them into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

import tokenreduce as tr
from tokenreduce.cost import DecoderShape, prefill_flops
from tokenreduce.ops.attention import importance

RESULTS = Path(__file__).with_name("results")
SLOTS, TEXT = 210, 34


def decoder(layers: int, hidden: int = 896, dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    """Qwen2-0.5B's widths, random weights, a small vocabulary."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=4864 * hidden // 896, num_attention_heads=hidden // 64,
        num_key_value_heads=2, num_hidden_layers=layers, vocab_size=1000, max_position_embeddings=131072,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval().to(dtype)


def video(frames: int, hidden: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, tr.TokenLayout]:
    """Video-like embeddings: each slot is an AR(1) process over frames, median similarity of neighbours about 0.65."""
    generator = torch.Generator().manual_seed(1)
    slot_share = torch.rand(SLOTS, 1, generator=generator) * 0.7 + 0.3
    states = [torch.randn(SLOTS, hidden, generator=generator)]
    for _ in range(frames - 1):
        fresh = torch.randn(SLOTS, hidden, generator=generator)
        states.append(slot_share * states[-1] + (1 - slot_share**2).sqrt() * fresh)
    text = torch.randn(TEXT, hidden, generator=generator)
    embeds = torch.cat([text[:14], *states, text[14:]])[None].to(dtype)
    return embeds, tr.TokenLayout.video(before=14, frames=frames, per_frame=SLOTS, after=TEXT - 14)


def take_turns(arms: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """CPU seconds of each repetition of each arm."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repeats + warmup):
        for name, arm in arms.items():
            started = time.process_time()
            arm()
            if turn >= warmup:
                seconds[name].append(time.process_time() - started)
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and extremes."""
    return {
        name: {"median": statistics.median(times), "min": min(times), "max": max(times), "runs": len(times)}
        for name, times in seconds.items()
    }


def prefill(quick: bool) -> dict[str, Any]:
    """Measured against FLOP-predicted speed-up of the prefill, 24 layers of width 896."""
    layers, rows = 24, []
    settings = [(20, torch.float32, 0.3)] if quick else [
        (20, torch.float32, 0.3), (20, torch.bfloat16, 0.3), (40, torch.float32, 0.3),
        (20, torch.float32, 0.1), (20, torch.float32, 0.5), (20, torch.float32, 0.7),
    ]  # fmt: skip
    for frames, dtype, share in settings:
        model = decoder(layers, dtype=dtype)
        embeds, layout = video(frames, 896, dtype)
        traces: dict[str, tr.Trace] = {}

        def run(name: str | None) -> None:
            with torch.inference_mode():
                if name is None:
                    model(inputs_embeds=embeds, logits_to_keep=1)
                    return
                with tr.reduce(model, name, budget=share, layout=layout) as attached:
                    model(inputs_embeds=embeds, logits_to_keep=1)
                    traces[name] = attached.trace

        names = ("framefusion", "framefusion_official", "fastv")
        arms = {"dense": lambda: run(None)} | {name: (lambda name=name: run(name)) for name in names}
        seconds = take_turns(arms, repeats=3 if frames == 20 else 2, warmup=1 if frames == 20 else 0)
        medians = summary(seconds)
        shape = DecoderShape.from_config(model.config)
        n = embeds.shape[1]
        dense = prefill_flops(shape, [n] * layers, [n] * layers, form="causal")
        for name in names:
            trace = traces[name]
            attn = [int(layer.tokens) for layer in trace.layers]
            ffn = [int(layer.ffn_tokens) for layer in trace.layers]
            predicted = dense / (prefill_flops(shape, attn, ffn, form="causal") + trace.selector_flops)
            measured = medians["dense"]["median"] / medians[name]["median"]
            rows.append(
                {
                    "tokens": n, "dtype": str(dtype).removeprefix("torch."), "budget": share, "pipeline": name,
                    "measured": measured, "predicted": predicted, "ratio": measured / predicted,
                    "dense_seconds": medians["dense"], "seconds": medians[name],
                }
            )  # fmt: skip
            print(f"  N={n} {dtype} C={share} {name}: {measured:.2f}× measured, {predicted:.2f}× predicted", flush=True)
    return {"layers": layers, "rows": rows}


def decode(quick: bool) -> dict[str, Any]:
    """What an attached pipeline costs a decode step, 24 layers; an empty one must cost nothing."""
    model = decoder(24)
    embeds, layout = video(4, 896)
    token = torch.zeros(1, 1, dtype=torch.long)

    def cached(pipeline: Any) -> tuple[Any, DynamicCache]:
        run = None if pipeline is None else tr.attach(model, pipeline, layout=layout)
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(inputs_embeds=embeds, past_key_values=cache, logits_to_keep=1)
        return run, cache

    rows = []
    keep_all = {"name": "keep_all", "budget": 1.0, "stages": [{"strategy": "fastv"}]}
    for name, pipeline in (
        ("empty", {"name": "empty", "stages": []}),
        ("keep all", keep_all),
        ("framefusion", "framefusion"),
    ):
        _, dense_cache = cached(None)
        run, cache = cached(pipeline)
        steps: dict[str, list[float]] = {"dense": [], "attached": []}
        for _ in range(20 if quick else 100):
            for arm, held in (("attached", cache), ("dense", dense_cache)):
                if arm == "dense":
                    run.detach()
                started = time.process_time()
                with torch.inference_mode():
                    model(input_ids=token, past_key_values=held)
                steps[arm].append(time.process_time() - started)
                held.crop(-1)
                if arm == "dense":
                    run = tr.attach(model, pipeline, layout=layout)
        run.detach()
        medians = summary(steps)
        extra = 1e3 * (medians["attached"]["median"] - medians["dense"]["median"])
        rows.append({"pipeline": name, "extra_ms_per_step": extra, "seconds": medians})
        print(f"  {name}: {extra:+.3f} ms per step on {1e3 * medians['dense']['median']:.2f} ms", flush=True)
    return {"layers": 24, "rows": rows}


def cumulative(quick: bool) -> dict[str, Any]:
    """Exact cumulative importance without an N×N matrix: time against one decoder layer, and peak extra memory."""
    rows = []
    for n in (1024, 4096) if quick else (1024, 4096, 8192, 13500):
        model = decoder(1)
        embeds = torch.randn(1, n, 896)
        q, k = torch.randn(14, n, 64), torch.randn(2, n, 64)
        with torch.inference_mode():
            seconds = take_turns(
                {
                    "layer": lambda: model.model(inputs_embeds=embeds, use_cache=False),
                    "last": lambda: importance(q, k, 0.125, 1),
                    "cumulative": lambda: importance(q, k, 0.125, n),
                },
                repeats=3,
            )
        medians = summary(seconds)
        share = medians["cumulative"]["median"] / medians["layer"]["median"]
        rows.append({"tokens": n, "share_of_a_layer": share, "share_of_28_layers": share / 28, "seconds": medians})
        print(f"  N={n}: cumulative {share:.1%} of a layer, {share / 28:.2%} of 28", flush=True)
    return {"rows": rows}


CASES: dict[str, Callable[[bool], dict[str, Any]]] = {"prefill": prefill, "decode": decode, "cumulative": cumulative}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"out of: {', '.join(CASES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="smaller settings")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown case {sorted(unknown)[0]}; known: {', '.join(CASES)}")
    torch.set_num_threads(arguments.threads)
    RESULTS.mkdir(exist_ok=True)
    for name in arguments.cases or CASES:
        print(name, flush=True)
        result = CASES[name](arguments.quick)
        machine = {"date": date.today().isoformat(), "machine": platform.machine(), "threads": arguments.threads}
        machine |= {"torch": torch.__version__, "python": platform.python_version(), "quick": arguments.quick}
        file = RESULTS / f"{name}.json"
        file.write_text(json.dumps(machine | result, indent=1), encoding="utf-8")
        print(f"wrote {file}", flush=True)


if __name__ == "__main__":
    main()
