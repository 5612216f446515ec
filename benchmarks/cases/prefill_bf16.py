"""As `prefill`, in bfloat16, and how fast this machine's kernels are in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from harness import HIDDEN, Options, Row, decoder, summary, table, take_turns
from torch.nn.functional import linear, scaled_dot_product_attention

from cases.prefill import LAYERS, Setting, measured, rows_table
from tokenreduce.planning.cost import DecoderShape, attention_pairs, prefill_flops

TITLE = f"Prefill in bfloat16: {LAYERS} layers of width {HIDDEN}"
SETTINGS: tuple[Setting, ...] = ((20, torch.bfloat16, (0.3,), 3), (40, torch.bfloat16, (0.3,), 3))
QUICK: tuple[Setting, ...] = ((2, torch.bfloat16, (0.7,), 1),)
QUERIES = 4096


def measure(options: Options) -> dict[str, Any]:
    """The turns of each setting, and the speed of the two kernels that take the time."""
    settings = QUICK if options.quick else SETTINGS
    if options.frames:
        settings = tuple((frames, *settings[0][1:]) for frames in options.frames)
    data = measured(options, settings, ("framefusion", "fastv"))
    shape = DecoderShape.from_config(decoder(1, data["hidden"]).config)
    rates = {name: kernel_rates(shape, getattr(torch, name)) for name in ("float32", "bfloat16")}
    for row in data["rows"]:
        row["by_kernels"] = by_kernels(shape, row, rates[row["dtype"]])
    return {**data, "rates": rates}


def kernel_rates(shape: DecoderShape, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a matrix product, and of causal attention."""
    x, weight = torch.randn(QUERIES // 2, shape.hidden).to(dtype), torch.randn(shape.ffn, shape.hidden).to(dtype)
    q = torch.randn(1, shape.heads, QUERIES, shape.head_dim).to(dtype)
    with torch.inference_mode():
        seconds = take_turns(
            {
                "linear": lambda: linear(x, weight),
                "attention": lambda: scaled_dot_product_attention(q, q, q, is_causal=True),
            },
            3,
        )
    flops = {
        "linear": 2 * x.shape[0] * weight.numel(),
        "attention": 4 * shape.heads * shape.head_dim * attention_pairs(QUERIES, form="causal"),
    }
    return {name: flops[name] / summary(seconds[name])["median"] for name in flops}


def by_kernels(shape: DecoderShape, row: Row, rates: dict[str, float]) -> float:
    """The speed-up that FLOPs predict where each kind of FLOP takes the time that its kernel takes here."""

    def seconds(attn: list[int], ffn: list[int], selector: int) -> float:
        pairs = sum(4 * shape.heads * shape.head_dim * attention_pairs(tokens, form="causal") for tokens in attn)
        layers = sum(prefill_flops(shape, [a], [f], 0, form="causal") for a, f in zip(attn, ffn, strict=True))
        return (layers - pairs) / rates["linear"] + (pairs + selector) / rates["attention"]

    dense = [row["tokens"]] * len(row["attn"])
    return seconds(dense, dense, 0) / seconds(row["attn"], row["ffn"], row["selector_flops"])


def section(data: dict[str, Any], docs: Path) -> list[str]:
    """Two tables: against FLOPs, and against FLOPs at the speed of their kernels."""
    rates = "; ".join(
        f"{dtype}: {rate['linear'] / 1e9:.0f} GFLOP/s in matrix products, {rate['attention'] / 1e9:.0f} in attention"
        for dtype, rate in data["rates"].items()
    )
    cells = [
        (
            f"{row['tokens']:,}", row["pipeline"], f"{row['measured']['median']:.2f}×", f"{row['by_kernels']:.2f}×",
            f"**{row['measured']['median'] / row['by_kernels']:.2f}**",
        )
        for row in data["rows"]
    ]  # fmt: skip
    return [
        *rows_table(data),
        "",
        f"FLOPs are not alike: {rates}.",
        "Where attention takes longer per FLOP than a matrix product, as with instructions for bfloat16, the squares that",
        "reduction saves weigh more than their count; where products take longer, less. With each kind of FLOP at the speed",
        "of its kernel:",
        "",
        *table(("N", "pipeline", "measured", "predicted by kernels", "measured ÷ predicted"), cells),
    ]
