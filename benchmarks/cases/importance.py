"""What importance costs: beside the attention it reads, in a prefill, in memory, and all of the engine in a reduced prefill.

As a program (`python -m cases.importance LENGTH`) it measures one length in a process of its own.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from harness import (
    Options,
    Row,
    decoder,
    in_fresh_process,
    paired_ratio,
    spread,
    status,
    summary,
    table,
    take_turns,
    video,
)
from matplotlib.figure import Figure
from transformers import Qwen2Config, Qwen2ForCausalLM

import tokenreduce as tr
from tokenreduce.engine.forward.looks import Looks
from tokenreduce.engine.forward.state import Forward
from tokenreduce.engine.model.hooks import Hook
from tokenreduce.ops.attention import importance

TITLE = "Importance: cumulative attention without an N×N matrix"
HEADS, GROUPS, WIDTH = 14, 2, 64
DEPTH, WINDOW = 28, 32
LENGTHS = (1_024, 2_048, 4_224, 8_434, 13_500, 32_768, 65_536)
LAYER_UP_TO, TURNS_UP_TO = 13_500, 4_224
"""Longest input on which a layer is timed beside importance, and with three turns, not two; beyond, importance runs once."""
FASTV_ALL = {"name": "fastv, cumulative", "stages": [{"strategy": "fastv", "importance": "cumulative"}]}
PIPELINES = ("framefusion", "fastv", FASTV_ALL)
PARTS = ("engine", "strategies", "importance")
COLOURS = {"dense layer": "#000000", "plain": "#D55E00", "shared": "#0072B2", "window": "#E69F00", "last": "#009E73"}


def measure(options: Options) -> dict[str, Any]:
    """Each length in a process of its own; then reduced prefills with a clock in the engine."""
    rows = []
    for n in LENGTHS[:3] if options.quick else LENGTHS:
        rows.append(json.loads(in_fresh_process("cases.importance", str(n), str(options.threads))[0]))
        print(f"  N={n}: {rows[-1]['seconds']['shared']['median']:.3f} s", flush=True)
    wide = None if options.quick else _wide(LENGTHS[2])
    return {"rows": rows, "wide": wide, "engine": _engine(*((6, 1) if options.quick else (20, 2)))}


# One length ---------------------------------------------------------------------------------------------------------------


def _tensors(n: int, heads: int = HEADS, groups: int = GROUPS, width: int = WIDTH) -> tuple[torch.Tensor, ...]:
    """q, k of a layer, and the log-sum-exp that its attention has computed.

    Where no layer is timed it is the expected one of random scores: it takes part in the time and the memory, not in a result.
    """
    torch.manual_seed(0)
    q, k = torch.randn(1, heads, n, width), torch.randn(1, groups, n, width)
    if n > LAYER_UP_TO:
        return q[0], k[0], torch.arange(1, n + 1).log().add(0.5).expand(heads, n)
    keys = k.repeat_interleave(heads // groups, 1)
    lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, keys, 0.0, True)[1]
    return q[0], k[0], lse[0]


def _arms(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    scale, n = q.shape[-1] ** -0.5, q.shape[1]
    return {
        "shared": lambda: importance(q, k, scale, n, lse=lse),
        "plain": lambda: importance(q, k, scale, n),
        "window": lambda: importance(q, k, scale, WINDOW, lse=lse),
        "last": lambda: importance(q, k, scale, 1, lse=lse),
    }


def _layer(model: Any, n: int) -> Callable[[], None]:
    embeds = torch.randn(1, n, model.config.hidden_size)

    def forward() -> None:
        with torch.inference_mode():
            model(inputs_embeds=embeds, logits_to_keep=1, use_cache=False)

    return forward


def one_length(n: int) -> Row:
    """Seconds of importance and of one decoder layer in turns, and the memory that importance takes beyond its input."""
    q, k, lse = _tensors(n)
    arms = _arms(q, k, lse)
    extra = {name: _peak(arms[name]) for name in ("shared", "plain")}
    seconds = {name: [taken] for name, (taken, _) in extra.items()}
    if n <= LAYER_UP_TO:
        turns: Any = {**arms, "dense layer": _layer(decoder(1), n)}
        seconds = take_turns(turns, 3 if n <= TURNS_UP_TO else 2, warmup=n <= TURNS_UP_TO)
    else:
        seconds |= take_turns({name: arms[name] for name in ("window", "last")}, 3)
    layer = seconds.get("dense layer")
    shares = {name: paired_ratio(seconds[name], layer) for name in arms if layer}
    worst = float((arms["shared"]() - arms["plain"]()).abs().max()) if n <= TURNS_UP_TO else None
    return {
        "tokens": n, "seconds": {name: summary(times) for name, times in seconds.items()}, "share": shares,
        "extra_bytes": {name: bytes_ for name, (_, bytes_) in extra.items()}, "difference": worst,
    }  # fmt: skip


def _peak(call: Callable[[], Any]) -> tuple[float, int]:
    """Seconds of one call, and by how much it raised the resident memory at its highest (Linux: the mark is set back first)."""

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, started = status("VmRSS"), time.perf_counter()
    call()
    return time.perf_counter() - started, status("VmHWM") - before


def _wide(n: int) -> Row:
    """One layer of LLaVA-Video-7B's widths, each arm once after a warm-up."""
    config = Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, num_hidden_layers=1,
        vocab_size=1000, max_position_embeddings=1 << 17,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    _layer(model, 256)()
    seconds = take_turns({"dense layer": _layer(model, n)} | _arms(*_tensors(n, 28, 4, 128)), 1, warmup=0)
    return {"tokens": n, "seconds": {name: summary(times) for name, times in seconds.items()}}


# The engine in a reduced prefill ----------------------------------------------------------------------------------------------


@contextmanager
def _clocks(spent: Counter[str]) -> Iterator[None]:
    """Seconds in the engine's hooks, in strategies, in importance, and in the tap around attention without attention itself."""

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            out = function(*args, **kwargs)
            spent[name] += time.perf_counter() - started
            return out

        return call

    def tapped(self: Forward, layer: int, base: Any, *rest: Any) -> Any:
        return attend(self, layer, timed("attention", base), *rest)

    attend = Forward.attend

    with (
        patch.object(Hook, "__call__", timed("hooks", Hook.__call__)),
        patch.object(Forward, "attend", timed("tap", tapped)),
        patch.object(Looks, "ask", timed("strategies", Looks.ask)),
        patch.object(Forward, "importance", timed("importance", Forward.importance)),
    ):
        yield


def _engine(frames: int, repeats: int) -> list[Row]:
    """Shares of a reduced prefill, C = 0.3."""
    model = decoder(24)
    embeds, layout = video(frames)
    rows = []
    for pipeline in PIPELINES:
        shares: dict[str, list[float]] = {part: [] for part in PARTS}
        seconds: dict[str, list[float]] = {"seconds": [], "attach": []}
        for turn in range(-1, repeats):
            # The warm-up is a short one.
            inputs, places = video(2) if turn < 0 else (embeds, layout)
            spent: Counter[str] = Counter()
            started = time.perf_counter()
            with tr.reduce(model, pipeline, budget=0.3, layout=places), torch.inference_mode(), _clocks(spent):
                entered = time.perf_counter()
                model(inputs_embeds=inputs, logits_to_keep=1)
                prefill = time.perf_counter() - entered
            attach = time.perf_counter() - started - prefill
            if turn < 0:
                continue
            spent["engine"] = spent["hooks"] + spent["tap"] - spent["attention"]
            seconds["seconds"].append(prefill)
            seconds["attach"].append(attach)
            for part, values in shares.items():
                values.append(spent[part] / prefill)
        name = pipeline if isinstance(pipeline, str) else pipeline["name"]
        values = {part: summary(each) for part, each in (seconds | shares).items()}
        rows.append({"pipeline": name, "tokens": embeds.shape[1], **values})
        print(f"  {name}: engine {values['engine']['median']:.2%} of {values['seconds']['median']:.1f} s", flush=True)
    return rows


# The page ---------------------------------------------------------------------------------------------------------------------


def section(data: dict[str, Any], docs: Path) -> list[str]:
    """Time and memory by length, a row of 7B widths, and the engine's share of a reduced prefill."""
    cells = []
    for row in data["rows"]:
        times = {name: values["median"] for name, values in row["seconds"].items()}
        share = row["share"].get("shared")
        cells.append(
            (
                f"{row['tokens']:,}", *(f"{times[name]:.3f}" for name in ("shared", "plain")),
                f"{1e3 * times['window']:.1f}", f"{1e3 * times['last']:.2f}",
                f"{times['dense layer']:.2f}" if share else "–",
                *(f"{row['share'][name]['median']:.1%}" if share else "–" for name in ("shared", "plain")),
                f"{share['median'] / DEPTH:.2%}" if share else "–", row["seconds"]["shared"]["runs"],
                *(f"{row['extra_bytes'][name] / 2**20:.1f}" for name in ("shared", "plain")),
            )
        )  # fmt: skip
    columns = ("N", "shared s", "plain s", f"last {WINDOW} rows ms", "last row ms", "dense layer s", "shared ÷ layer")
    columns += ("plain ÷ layer", f"shared ÷ {DEPTH} layers", "turns", "memory, shared MiB", "plain MiB")
    engine = [
        (
            r["pipeline"], f"{r['tokens']:,}", f"{r['seconds']['median']:.1f}",
            *(spread({k: 100 * v for k, v in r[part].items()}) for part in PARTS), spread(r["attach"]),
            r["seconds"]["runs"],
        )
        for r in data["engine"]
    ]  # fmt: skip
    _plot(data, docs)
    differences = [row["difference"] for row in data["rows"] if row["difference"] is not None]
    lines = [
        f"One layer of width {HEADS * WIDTH}: {HEADS} heads of {WIDTH}, {GROUPS} of keys. *Plain* computes each block of scores",
        "and its softmax anew; *shared* takes the rows' log-sum-exp, which SDPA's flash attention on a CPU computes anyway, so",
        "that a score is one product and one exp2. The attention's output is the same to the bit. The two differ by at most",
        f"{max(differences):.0e} (up to {TURNS_UP_TO:,} tokens). The share of {DEPTH} layers is an extrapolation: that of one",
        f"layer divided by {DEPTH}. Memory is what a call adds to the resident memory at its peak; its input and the log-sum-exp",
        f"are not counted. Beyond {LAYER_UP_TO:,} tokens one run of each; no layer was timed.",
        "",
        *table(columns, cells),
        "",
        "![Time and memory of importance](benchmarks_importance.png)",
        "",
    ]
    if data["wide"]:
        wide, times = data["wide"], {name: values["median"] for name, values in data["wide"]["seconds"].items()}
        lines += [
            f"LLaVA-Video-7B's widths (3584, 28 heads of 128, 4 of keys) at {wide['tokens']:,} tokens, one run: a layer takes "
            f"{times['dense layer']:.1f} s, importance {times['shared']:.2f} s shared and {times['plain']:.2f} s plain: "
            f"{times['shared'] / times['dense layer']:.1%} and {times['plain'] / times['dense layer']:.1%} of the layer.",
            "",
        ]
    return [
        *lines,
        "Time in the engine, in % of a reduced prefill (24 layers, C = 0.3, fp32), by clocks in all of its hooks and in the tap",
        "around attention, less attention itself. Strategies are a part of it, importance a part of those. The residual sum that",
        "the engine computes in place of a layer counts as the engine's. Attaching and detaching is done once, however many",
        "prefills follow: the first time it runs a probe through all layers.",
        "",
        *table(
            ("pipeline", "N", "prefill s", "engine %", "strategies %", "importance %", "attaching s", "runs"), engine
        ),
        "",
        "On a GPU two Triton kernels compute importance. They are held to the plain code in Triton's interpreter and compile for",
        "compute capability 8.0; they have not run, and have not been timed, on a GPU.",
    ]


def _plot(data: dict[str, Any], docs: Path) -> None:
    rows = data["rows"]
    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    time_axis, memory_axis = figure.subplots(1, 2)
    for name, colour in COLOURS.items():
        points = [(r["tokens"], r["seconds"][name]["median"]) for r in rows if name in r["seconds"]]
        time_axis.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
    time_axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds")
    for name in ("shared", "plain"):
        points = [(r["tokens"], r["extra_bytes"][name] / 2**20) for r in rows]
        memory_axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], label=name)
    lengths = [r["tokens"] for r in rows]
    memory_axis.plot(lengths, [n / 1024 for n in lengths], ":", color="#888888", label="1 KiB a token")
    memory_axis.plot(
        lengths,
        [HEADS * n * n * 4 / 2**20 for n in lengths],
        "--",
        color="#888888",
        label=f"{HEADS} × N×N (never made)",
    )
    memory_axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="MiB beyond the input")
    for axis in (time_axis, memory_axis):
        axis.grid(color="#dddddd")
        axis.legend(fontsize=8)
    figure.savefig(docs / "benchmarks_importance.png")


if __name__ == "__main__":
    # M_MMAP_THRESHOLD: glibc returns each freed tensor to the system at once, instead of keeping those below 32 MiB.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(one_length(int(sys.argv[1]))))
