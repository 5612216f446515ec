"""Peak memory of a prefill, and the longest video that fits: what `tokenreduce plan --memory` says against real runs.

As a program (`python -m cases.memory '{"pipeline": null, "frames": 64, …}'`) it is one such run, in a process of its own.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import HIDDEN, SLOTS, TEXT, Options, Row, decoder, in_fresh_process, peak_memory, status, table, video
from transformers import DynamicCache

import tokenreduce as tr
from tokenreduce.budget import Budget
from tokenreduce.cli import main
from tokenreduce.ops.similarity import cosine_to, previous_in_slot
from tokenreduce.pipeline import build, load_pipeline
from tokenreduce.planning.account import Account
from tokenreduce.planning.cost import DecoderShape, kv_bytes
from tokenreduce.planning.feasibility import read_later
from tokenreduce.planning.memory import Peak, prefill_peak
from tokenreduce.planning.schedule import forecast

TITLE = "Memory"
BUDGET, THRESHOLD = 0.3, 0.6
PIPELINES = (None, "framefusion", "fastv")
MIB = 2**20
SPARE = 16 * MIB
"""Left beside the planned bytes: buffers of the matrix products, the engine's indices, rounding to pages."""
BEYOND = 1.15
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""glibc returns each freed tensor to the system at once, instead of keeping those below 32 MiB."""


# One run, in its own process -----------------------------------------------------------------------------------------------


def prefill(model: Any, pipeline: str | None, frames: int, hidden: int = HIDDEN) -> Row:
    """One prefill: bytes in the cache's own tensors, and the forecast of the trace.

    A copy of the vision rows is held, as a vision language model holds its vision features."""
    embeds, layout = video(frames)
    embeds = embeds[..., :hidden]
    features = embeds[:, layout.vision[0]]
    cache = DynamicCache(config=model.config)
    arguments = {"inputs_embeds": embeds, "past_key_values": cache, "logits_to_keep": 1}
    facts: Row = {"tokens": embeds.shape[1]}
    started = time.perf_counter()
    with torch.inference_mode():
        if pipeline is None:
            model(**arguments)
            counts = [embeds.shape[1]] * len(cache.layers)
            facts["kv_forecast"] = kv_bytes(DecoderShape.from_config(model.config), counts, embeds.element_size())
        else:
            with tr.reduce(model, pipeline, budget=BUDGET, layout=layout) as run:
                model(**arguments)
            facts["kv_forecast"] = run.trace.kv_bytes
    facts["seconds"] = time.perf_counter() - started
    facts["kv"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    del features
    return facts


def child(pipeline: str | None, frames: int, layers: int, limit: int = 0) -> Row:
    """Peak resident bytes above what the interpreter, the libraries and a first tiny prefill left; `limit` of them, if not 0."""
    torch.set_num_threads(1)
    prefill(decoder(layers, 128), pipeline, 8, 128)
    gc.collect()
    base = status("VmRSS")
    if limit:
        most = status("VmData") + limit
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    facts: Row = {"base": base, "fits": True}
    try:
        model = decoder(layers)
        facts["weights"] = sum(parameter.nbytes for parameter in model.parameters())
        facts |= prefill(model, pipeline, frames)
    except (MemoryError, RuntimeError) as error:
        if not limit or "memory" not in str(error).lower() + type(error).__name__.lower():
            raise
        facts["fits"] = False
    return facts | {"peak": peak_memory() - base}


def run(environment: dict[str, str] | None = None, **settings: Any) -> Row:
    """`child(**settings)` in a fresh process."""
    out, _ = in_fresh_process("cases.memory", json.dumps(settings), **(environment or {}))
    facts: Row = json.loads(out)
    return facts


# The forecast --------------------------------------------------------------------------------------------------------------


def outline(layers: int) -> Any:
    """The decoder's configuration."""
    with torch.device("meta"):
        return decoder(layers).config


def similar_share(frames: int) -> float:
    """Share of the vision tokens whose cosine with the frame before reaches the threshold: what `--similar` asks for."""
    embeds, layout = video(frames)
    previous = previous_in_slot(layout.slot[0], layout.media()[0], layout.vision[0])
    similar = cosine_to(embeds[0], previous) >= THRESHOLD
    return float(similar.sum() / layout.vision.sum())


def planned(shape: DecoderShape, pipeline: str | None, frames: int, similar: float, weights: int) -> Peak:
    """The worst moment as `plan` forecasts it."""
    vision = frames * SLOTS
    total = vision + TEXT
    if pipeline is None:
        counts = [total] * shape.layers
        return prefill_peak(shape, total, counts, counts, counts, 4, weights=weights, held=vision * HIDDEN)
    stages = build(load_pipeline(pipeline))
    account = Account(Budget.parse(BUDGET), shape, total, vision, 4)
    forecast(stages, account, similar=similar, frames=frames)
    return prefill_peak(
        shape, total, account.attn, account.ffn, account.kv, 4,
        weights=weights, held=vision * HIDDEN, read_later=read_later(stages, shape.layers),
    )  # fmt: skip


def edges(layers: int, memory: int, similar: float) -> Row:
    """The answer of `tokenreduce plan --memory` for the decoder, dense and with each pipeline."""
    config = outline(layers)
    config.architectures = ["Qwen2ForCausalLM"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        config.save_pretrained(folder)
        arguments = ["--model", folder, "--dtype", "float32", "--similar", str(similar), "--budget", str(BUDGET)]
        code = main(["plan", *(name for name in PIPELINES if name), *arguments, "--memory", f"{memory}B", "--json"])
    if code:
        raise RuntimeError(f"plan failed: {out.getvalue()}")
    plans: Row = json.loads(out.getvalue())["plans"]
    return plans


# The case ------------------------------------------------------------------------------------------------------------------


def measure(options: Options) -> Row:
    """Peak of a prefill of 64 frames, and runs at the edge of a memory and beyond it."""
    layers, frames = 8, 8 if options.quick else 64
    pipelines = PIPELINES[:2] if options.quick else PIPELINES
    shape = DecoderShape.from_config(outline(layers))
    similar = similar_share(frames)
    rows: list[Row] = []
    for name in pipelines:
        exact = run(EXACT, pipeline=name, frames=frames, layers=layers)
        usual = exact if options.quick else run(pipeline=name, frames=frames, layers=layers)
        peak = planned(shape, name, frames, similar, exact["weights"])
        parts = {"forecast": peak.total, "activations": peak.activations, "inputs": peak.inputs, "kv_then": peak.kv}
        rows.append({"name": name or "dense", **exact, **parts, "usual_peak": None if options.quick else usual["peak"]})
    memory = rows[0]["weights"] + (192 if options.quick else 512) * MIB
    limits: list[Row] = []
    plans = edges(layers, memory, similar)
    for name in pipelines:
        plan = plans[name or "dense"]
        row: Row = {"name": name or "dense", "frames": plan["frames"], "forecast": plan["total"]}
        for key, count in (("edge", plan["frames"]), ("beyond", int(plan["frames"] * BEYOND + 1))):
            settings = {"pipeline": name, "frames": count, "layers": layers, "limit": memory + SPARE}
            row[key] = {"frames": count, **run(EXACT, **settings)}
        limits.append(row)
    return {
        "layers": layers, "frames": frames, "similar": similar, "memory": memory, "spare": SPARE, "rows": rows, "limits": limits
    }  # fmt: skip


def section(data: Row, docs: Path) -> list[str]:
    """Markdown and the plot."""
    rows, limits = data["rows"], data["limits"]
    plot(data, docs / "benchmarks_memory.png")
    columns = ["", "weights", "KV held", "KV forecast", "peak", "forecast", "error", "above weights", "usual glibc"]
    peaks = table(columns, [_peak_row(row) for row in rows])
    columns = ["", "longest video planned", "tokens", "forecast", "run there", "peak", f"run at {BEYOND:g}×"]
    tried = table(columns, [_edge_row(row) for row in limits])
    dense = rows[0]["peak"] - rows[0]["weights"]
    shares = ", ".join(f"{row['name']} {(row['peak'] - row['weights']) / dense:.2f}×" for row in rows[1:])
    return [
        f"A prefill of {data['frames']} frames ({rows[0]['tokens']:,} tokens) in a decoder of {data['layers']} layers,",
        f"{HIDDEN} wide, float32, sdpa, C = {BUDGET:g}, one run each in a process of its own. Peaks are of the resident set, in",
        "MiB, above what the interpreter, the libraries and a first tiny prefill leave. Depth changes only weights and KV; the",
        "rest of the peak is that of one layer. A copy of the vision rows stands for the features that a vision language model",
        "holds. KV held is the size of the cache's own tensors.",
        "",
        *peaks,
        "",
        f"Above the weights, against dense: {shares}. FastV's worst moment is in layer 1, before it has dropped anything:",
        "it saves KV and time, hardly peak memory. The peaks are with MALLOC_MMAP_THRESHOLD_=65536, under which glibc returns",
        "each freed tensor; in the last column without, where it keeps freed ones of less than 32 MiB.",
        "",
        f"The longest video in {mib(data['memory'])} MiB: `tokenreduce plan --memory {data['memory']}B",
        f"--similar {data['similar']:.3f}` says how many frames, and a process that may not have more (RLIMIT_DATA, and",
        f"{mib(data['spare'])} MiB to spare for buffers of the matrix products) runs them, then more of them.",
        "",
        *tried,
        "",
        "![Parts of the peak](benchmarks_memory.png)",
    ]


def _peak_row(row: Row) -> list[str]:
    usual = row["usual_peak"]
    return [
        row["name"], mib(row["weights"]), f"{row['kv']:,} B", f"{row['kv_forecast']:,} B",
        mib(row["peak"]), mib(row["forecast"]), f"{row['forecast'] / row['peak'] - 1:+.1%}",
        mib(row["peak"] - row["weights"]), "not run" if usual is None else mib(usual),
    ]  # fmt: skip


def _edge_row(row: Row) -> list[str]:
    edge, beyond = row["edge"], row["beyond"]
    tokens = row["frames"] * SLOTS + TEXT
    return [
        row["name"], f"{row['frames']} frames", f"{tokens:,}", mib(row["forecast"]), fits(edge), mib(edge["peak"]),
        f"{beyond['frames']} frames: {fits(beyond)}",
    ]  # fmt: skip


def plot(data: Row, file: Path) -> None:
    """Forecast parts of each peak as a bar, and a mark where the measured peak is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    axes = figure.subplots()
    names = [row["name"] for row in data["rows"]]
    left = [0.0] * len(names)
    labels = {"weights": "weights", "inputs": "inputs", "kv_then": "KV cache", "activations": "activations"}
    for part, label in labels.items():
        widths = [row[part] / MIB for row in data["rows"]]
        axes.barh(names, widths, left=left, label=label, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.plot([row["peak"] / MIB for row in data["rows"]], names, "k|", markersize=24, label="measured")
    axes.invert_yaxis()
    axes.set_xlabel(f"MiB, prefill of {data['frames']} frames")
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)


def mib(count: int) -> str:
    """MiB without decimals."""
    return f"{count / MIB:,.0f}"


def fits(facts: Row) -> str:
    """How the run ended."""
    return "fits" if facts["fits"] else "out of memory"


if __name__ == "__main__":
    print(json.dumps(child(**json.loads(sys.argv[1]))))
