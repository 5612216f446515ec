"""A million vision tokens: the selectors alone, and a long video in one shot or as a stream.

Each measurement of memory is a process of its own: `python -m cases.scale WHAT ARGUMENTS` prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import HIDDEN, SLOTS, TEXT, Options, Row, decoder, in_fresh_process, spread, summary, table, video
from matplotlib.figure import Figure

import tokenreduce as tr
from tokenreduce.ops.similarity import cosine_to, merge_runs, previous_in_slot
from tokenreduce.ops.topk import top_mask

TITLE = "Scale: a million vision tokens, and streams"
THRESHOLD, WIDTH, FRAMES_FED, LAYERS = 0.6, 1024, 4, 4
"""Of the stream: similarity threshold, tokens that the decoder takes at once, frames fed at once, layers."""
MAX_RUN = 16
PLANNED = ("framefusion", "fastv", "streaming_llm")
MIB = 2**20


def measure(options: Options) -> Row:
    """The settings of the two parts, and their results."""
    frames = (50, 100, 200) if options.quick else (1190, 2381, 4762)
    long = 12 if options.quick else 60
    repeats = 1 if options.quick else 2
    threads = str(options.threads)
    selectors = []
    for width, dtype in ((HIDDEN, "float32"), (4 * HIDDEN, "bfloat16")):
        for n in frames:
            runs = [_child("selectors", n, width, dtype, threads) for _ in range(repeats)]
            selectors.append({"width": width, "dtype": dtype, "tokens": n * SLOTS + TEXT, "runs": runs})
    arms: dict[str, list[Row]] = {"one shot": [], "stream": [], f"stream, max_run {MAX_RUN}": []}
    arms[f"one shot, max_run {MAX_RUN}"] = []
    for turn in range(min(repeats, 2)):
        for name in list(arms)[:: 1 if turn % 2 == 0 else -1]:
            arms[name].append(_child("prefill", name, long, threads))
    return {
        "selectors": selectors,
        "plans": _plans(frames),
        "stream": {
            "tokens": long * SLOTS + TEXT, "frames": long, "layers": LAYERS, "width": WIDTH, "fed": FRAMES_FED,
            "threshold": THRESHOLD, "arms": arms,
        },
    }  # fmt: skip


def _child(*arguments: Any) -> Row:
    out, peak = in_fresh_process("cases.scale", *(str(argument) for argument in arguments))
    found: Row = json.loads(out)
    return found | {"peak": peak}


# The parent's own part ------------------------------------------------------------------------------------------------


def _plans(frames: tuple[int, ...]) -> list[Row]:
    """Seconds that the Budget solver and the Account take for LLaVA-Video-7B, as `tokenreduce plan` asks them."""
    from tokenreduce.pipeline import build, load_pipeline
    from tokenreduce.planning.account import Account
    from tokenreduce.planning.architectures import architecture
    from tokenreduce.planning.feasibility import check
    from tokenreduce.planning.schedule import forecast

    model, rows = architecture("llava-video-7b"), []
    for name in PLANNED:
        for n in frames:
            times = []
            for _ in range(4):
                started = time.perf_counter()
                pipeline = load_pipeline(name).with_budget(0.3)
                strategies = build(pipeline)
                account = Account(pipeline.budget, model.shape, model.tokens(n), model.vision_tokens(n))
                check(strategies, account)
                forecast(strategies, account, frames=n)
                times.append(time.perf_counter() - started)
            rows.append({"pipeline": name, "tokens": model.tokens(n), "seconds": summary(times[1:])})
    return rows


# Children -------------------------------------------------------------------------------------------------------------


class Watch:
    """Seconds of a call, and by how much the resident memory grew at most while it ran (looked at each millisecond)."""

    def __call__(self, call: Callable[[], Any]) -> tuple[Any, Row]:
        base = most = _resident()
        stop = threading.Event()

        def look() -> None:
            nonlocal most
            while not stop.wait(0.001):
                most = max(most, _resident())

        watcher = threading.Thread(target=look)
        watcher.start()
        started = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - started
        most = max(most, _resident())
        stop.set()
        watcher.join()
        return result, {"seconds": seconds, "extra": most - base}


def _resident() -> int:
    """Resident memory of this process now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def long_video(frames: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, tr.TokenLayout]:
    """The video of `harness.video`, in a multiple of its width, made in place: no second copy of a million rows is there.

    Wider rows repeat the narrow one, which changes no cosine."""
    generator = torch.Generator().manual_seed(1)
    layout = tr.TokenLayout.video(before=14, frames=frames, per_frame=SLOTS, after=TEXT - 14)
    x = torch.empty(1, layout.shape[1], width, dtype=dtype)
    share = torch.rand(SLOTS, 1, generator=generator) * 0.7 + 0.3
    state = torch.randn(SLOTS, HIDDEN, generator=generator)
    x[0, :14] = x[0, 14 - TEXT :] = 1.0
    for frame in range(frames):
        if frame:
            fresh = torch.randn(SLOTS, HIDDEN, generator=generator)
            state = share * state + (1 - share**2).sqrt() * fresh
        x[0, 14 + frame * SLOTS : 14 + (frame + 1) * SLOTS] = state.repeat(1, width // HIDDEN)
    return x, layout


def selectors(frames: int, width: int, dtype: str) -> Row:
    """Each step of similarity merge and of top-k on one video."""
    x, layout = long_video(frames, width, getattr(torch, dtype))
    n, watch = layout.shape[1], Watch()
    slot, medium, able = layout.slot[0], layout.media()[0], layout.reducible()[0]
    steps: Row = {}
    cosine_to(x[0, :2000], torch.arange(2000) - 1)  # Warm.
    previous, steps["previous_in_slot"] = watch(lambda: previous_in_slot(slot, medium, able))
    cosine, steps["cosine_to"] = watch(lambda: cosine_to(x[0], previous))
    target, steps["merge_runs"] = watch(lambda: merge_runs(previous, cosine >= THRESHOLD))
    size = torch.ones(1, n, dtype=torch.long)
    merge = tr.Reduction.merge(target[None])
    _, steps["validate"] = watch(merge.validate)
    merged, steps["apply, merge"] = watch(lambda: merge.apply(x, size))
    left = merged.hidden.nbytes
    del merged
    scores = torch.rand(n, generator=torch.Generator().manual_seed(2))
    mask, steps["top_mask"] = watch(lambda: top_mask(scores, 3 * n // 10, able))
    keep = tr.Reduction.keep((mask | ~able)[None])
    kept, steps["apply, top-k"] = watch(lambda: keep.apply(x, size))
    return {"steps": steps, "input": x.nbytes, "left": {"apply, merge": left, "apply, top-k": kept.hidden.nbytes}}


def prefill(arm: str, frames: int) -> Row:
    """One prefill of the decoder, in one shot or as a stream. The hidden state of the last token tells both apart."""
    model = decoder(LAYERS)
    x, layout = video(frames)
    stage = {"strategy": "similarity_merge", "threshold": THRESHOLD, "at": 0, "stop_below": 0.0}
    if "max_run" in arm:
        stage["max_run"] = MAX_RUN
    pipeline = {"name": "merge", "stages": [stage]}
    base, held = _resident(), 0
    with torch.no_grad():
        started = time.perf_counter()
        if arm.startswith("one shot"):
            with tr.reduce(model, pipeline, layout=layout) as run:
                out, trace = model(inputs_embeds=x, use_cache=True, logits_to_keep=1), run.trace
        else:
            with tr.stream(model, pipeline, width=WIDTH) as stream:
                stream.feed(x[:, :14])
                for clip in x[0, 14 : 14 + frames * SLOTS].view(frames, SLOTS, -1).split(FRAMES_FED):
                    stream.feed_frames(clip)
                    held = max(held, stream.waiting)
                out, trace = stream.finish(x[:, 14 + frames * SLOTS :], logits_to_keep=1), stream.trace
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds, "before": base, "left": len(trace.kept[0]), "held": held, "flops": trace.flops,
        "kept": hash(tuple(trace.kept[0].tolist())), "logits": out.logits[0, -1, :64].tolist(),
    }  # fmt: skip


def main() -> None:
    what, *arguments = sys.argv[1:]
    torch.set_num_threads(int(arguments.pop()))
    if what == "selectors":
        frames, width, dtype = arguments
        print(json.dumps(selectors(int(frames), int(width), dtype)))
    else:
        print(json.dumps(prefill(arguments[0], int(arguments[1]))))


# The page -------------------------------------------------------------------------------------------------------------


def section(data: Row, docs: Path) -> list[str]:
    """What docs/benchmarks.md shows."""
    lines = [
        f"**Selectors.** Videos of {SLOTS} tokens per frame, made as in the other cases. Each row is one process; time is the "
        "median of its runs, `extra` the most by which resident memory grew during the step, its output included.",
        "",
    ]
    for width, dtype in dict.fromkeys((part["width"], part["dtype"]) for part in data["selectors"]):
        parts = [part for part in data["selectors"] if (part["width"], part["dtype"]) == (width, dtype)]
        columns = [f"D = {width}, {dtype}"]
        columns += [
            f"{part['tokens'] / 1e6:.2f} M tokens ({part['runs'][0]['input'] / MIB:,.0f} MiB)" for part in parts
        ]
        rows = []
        for step in parts[0]["runs"][0]["steps"]:
            row = [f"`{step}`"]
            for part in parts:
                times = summary([run["steps"][step]["seconds"] for run in part["runs"]])
                extra = max(run["steps"][step]["extra"] for run in part["runs"]) / MIB
                output = part["runs"][0]["left"].get(step)
                what = f" ({output / MIB:,.0f} of it output)" if output else ""
                row.append(f"{spread(times, 3, ' s')}, {extra:,.0f} MiB{what}")
            rows.append(row)
        lines += [*table(columns, rows), ""]
    rows = [[row["pipeline"], f"{row['tokens']:,}", spread(row["seconds"], 4, " s")] for row in data["plans"]]
    lines += ["**Planning** for LLaVA-Video-7B at C = 0.3 (budget check and forecast):", ""]
    lines += [*table(["pipeline", "tokens", "seconds"], rows), ""]
    return lines + _stream_lines(data["stream"]) + _plot(data["selectors"], docs)


def _stream_lines(data: Row) -> list[str]:
    arms, rows = data["arms"], []
    for name, runs in arms.items():
        other = arms[name.replace("stream", "one shot")][0]
        worst = max(abs(a - b) for run in runs for a, b in zip(run["logits"], other["logits"], strict=True))
        same = all(run["kept"] == other["kept"] for run in runs)
        rows.append(
            [
                name,
                f"{runs[0]['left']:,}",
                f"{runs[0]['held']:,}" if runs[0]["held"] else "",
                spread(summary([run["seconds"] for run in runs]), 1, " s"),
                spread(summary([(run["peak"] - run["before"]) / MIB for run in runs]), 0, " MiB"),
                "" if name.startswith("one shot") else f"{worst:.1e}, {'the same' if same else 'OTHER'} tokens kept",
            ]
        )
    columns = ["arm", "tokens left", "most held back", "time", "peak above the start", "largest difference of logits"]
    return [
        f"**Streams.** {data['frames']} frames, {data['tokens']:,} tokens, {data['layers']} layers of width {HIDDEN}, float32, "
        f"similarity merge at {data['threshold']} before layer 0; streams are fed {data['fed']} frames at a time, the decoder "
        f"takes {data['width']:,} tokens at a time. The peak is of a fresh process, above what it held before the prefill "
        "(weights and the whole input, which a real stream would not hold). Logits of the last token against the one shot.",
        "",
        *table(columns, rows),
        "",
    ]


def _plot(parts: list[Row], docs: Path) -> list[str]:
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for width, dtype in dict.fromkeys((part["width"], part["dtype"]) for part in parts):
        mine = [part for part in parts if (part["width"], part["dtype"]) == (width, dtype)]
        for steps, name in ((("previous_in_slot", "cosine_to", "merge_runs", "apply, merge"), "merge"),
                            (("top_mask", "apply, top-k"), "top-k")):  # fmt: skip
            seconds = [
                summary([sum(run["steps"][step]["seconds"] for step in steps) for run in part["runs"]])["median"]
                for part in mine
            ]
            axes.plot([part["tokens"] / 1e6 for part in mine], seconds, "o-", label=f"{name}, D = {width} {dtype}")
    axes.set(xlabel="million tokens", ylabel="seconds", xlim=0, ylim=0)
    axes.legend(fontsize="small")
    figure.savefig(docs / "benchmarks_scale.png", dpi=150)
    return ["![Seconds over tokens](benchmarks_scale.png)"]


if __name__ == "__main__":
    main()
