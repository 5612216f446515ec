"""The arithmetic of docs/scale.md: an hour of video on a node of eight GPUs. `python benchmarks/node.py` prints its tables.

Nothing here is measured. Counts come from tokenreduce's own forecast and cost formulas; what is assumed is a constant below.
"""

from __future__ import annotations

import argparse

from harness import table

from tokenreduce.pipeline import build, load_pipeline
from tokenreduce.planning import cost
from tokenreduce.planning.account import Account
from tokenreduce.planning.architectures import Architecture, architecture
from tokenreduce.planning.feasibility import check
from tokenreduce.planning.memory import prefill_peak
from tokenreduce.planning.schedule import forecast

GPUS = 8
PEAK, UTILISATION = 989e12, 0.4
"""Assumed: bf16 FLOP/s that NVIDIA publishes for one H100 SXM (dense), and the share of it that a prefill reaches."""
BANDWIDTH = 3.35e12
"""Assumed: bytes per second of its memory, as published."""
SIMILAR = 0.5
"""Assumed: share of tokens similar to the frame before (S_threshold is about the median, FrameFusion section 7)."""
MAX_RUN, WINDOW, WIDTH = 16, 65536, 1024
GIB = 2**30

MERGE = {"strategy": "similarity_merge", "threshold": 0.6, "at": 0, "stop_below": 0.0, "max_run": MAX_RUN}
SPAN = {"strategy": "streaming_window", "sinks": 8, "window": WINDOW}
ARMS = {
    "dense": None,
    "framefusion, C = 0.3": load_pipeline("framefusion").with_budget(0.3),
    "fastv, C = 0.3": load_pipeline("fastv").with_budget(0.3),
    f"stream: merge, max_run {MAX_RUN}": load_pipeline({"name": "stream", "stages": [MERGE]}),
    f"stream: merge, window {WINDOW:,}": load_pipeline({"name": "stream window", "stages": [MERGE, SPAN]}),
}


def account_of(model: Architecture, frames: int, arm: str) -> Account:
    """Token counts of every layer, as `tokenreduce plan` forecasts them."""
    pipeline = ARMS[arm]
    strategies = [] if pipeline is None else build(pipeline)
    account = Account(
        None if pipeline is None else pipeline.budget,
        model.shape,
        model.tokens(frames),
        model.vision_tokens(frames),
        model.dtype_bytes,
    )
    check(strategies, account)
    forecast(strategies, account, similar=SIMILAR, frames=model.steps(frames))
    return account


def causal_flops(account: Account) -> int:
    """FLOPs of the prefill with the pairs that a causal kernel works on; those over a span are counted as they are."""
    pairs = [
        None if pairs is None or pairs == attn * held else pairs
        for attn, held, pairs in zip(account.attn, account.kv, account.pairs, strict=True)
    ]
    return cost.prefill_flops(account.shape, account.attn, account.ffn, form="causal", pairs=pairs)


def weights(shape: cost.DecoderShape) -> int:
    """Elements of the decoder's matrices, embeddings and LM head included."""
    layer = shape.hidden * shape.head_dim * 2 * (shape.heads + shape.kv_heads) + 3 * shape.hidden * shape.ffn
    return shape.layers * layer + 2 * shape.vocab * shape.hidden


def node(name: str, frames: int) -> list[str]:
    """KV cache, FLOPs and time of each arm."""
    model = architecture(name)
    shape, size = model.shape, model.dtype_bytes
    split = min(GPUS, shape.kv_heads)
    rows = []
    for arm in ARMS:
        account = account_of(model, frames, arm)
        flops, kv = causal_flops(account), cost.kv_bytes(shape, account.kv, size)
        projections = cost.prefill_flops(shape, account.attn, account.ffn, pairs=[0] * shape.layers)
        selector = account.selector_flops
        rows.append(
            [
                arm,
                f"{account.attn[0]:,} … {account.attn[-1]:,}",
                f"{sum(account.kv) / shape.layers / account.total:.3f}",
                f"{kv / GIB:.1f}",
                f"{kv / GIB / split:.2f}",
                f"{kv / 2**20 / split / shape.layers:.1f}",
                f"{flops / 1e15:.1f}",
                f"{1 - projections / flops:.0%}",
                f"{selector / 1e15:.2f}",
                f"{(flops + selector) / (GPUS * PEAK * UTILISATION):.0f}",
            ]
        )
    columns = [
        "arm",
        "tokens, first … last layer",
        "C",
        "KV GiB",
        f"KV GiB per GPU (1/{split})",
        "KV MiB per layer and GPU",
    ]
    columns += ["prefill PFLOP (causal)", "of it attention pairs", "importance PFLOP", "seconds on the node"]
    held = model.tokens_per_frame * shape.hidden * (MAX_RUN * size + size + 4)
    n = model.tokens(frames)
    whole, piece = (
        prefill_peak(shape, tokens, *[[tokens] * shape.layers] * 3, size).activations for tokens in (n, WIDTH)
    )
    traffic = 4 * n * shape.hidden * size
    return [
        f"**{name}**, {frames:,} frames, {n:,} tokens; weights {weights(shape) * size / GIB:.1f} GiB, "
        f"{weights(shape) * size / GIB / GPUS:.1f} per GPU.",
        "",
        *table(columns, rows),
        "",
        f"Temporary tensors of one GPU that would run a layer alone: {whole / GIB:.1f} GiB for the dense prefill at once, "
        f"{piece / GIB:.2f} GiB for pieces of {WIDTH:,} tokens. Carry of a stream with max_run {MAX_RUN}: at most "
        f"{held / GIB:.3f} GiB. "
        f"Similarity and merging move about {traffic / GIB:.0f} GiB, {traffic / BANDWIDTH * 1e3:.0f} ms of one GPU's memory; "
        f"by Eq. 6 they are {cost.similarity_flops(shape, n) / 1e12:.3f} TFLOP.",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=3600, help="of the video (default: an hour at 1 fps)")
    frames = parser.parse_args().frames
    for name in ("llava-video-7b", "llava-video-72b"):
        print("\n".join(node(name, frames)))


if __name__ == "__main__":
    main()
