"""As `prefill_bf16`, with the matrix products of both arms on the kernels of float32."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import HIDDEN, Options, summary, take_turns
from torch import Tensor, nn
from torch.nn.functional import linear

from cases.prefill import LAYERS, Setting, rows_table, setting_rows
from cases.prefill_bf16 import INNER, QUERIES, QUICK

TITLE = f"Prefill in bfloat16, products on float32 kernels: {LAYERS} layers of width {HIDDEN}"
SETTINGS: tuple[Setting, ...] = ((20, torch.bfloat16, (0.3,), 3), (40, torch.bfloat16, (0.3,), 3))


def measure(options: Options) -> dict[str, Any]:
    """Dense and each pipeline in turns, and the speed of a product either way."""
    settings = QUICK if options.quick else SETTINGS
    rows = [row for setting in settings for row in setting_rows(*setting, ("framefusion", "fastv"), widen)]
    return {"layers": LAYERS, "rows": rows, "rates": rates()}


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x in bfloat16 with weights already widened: added up in float32, as hardware does it, and rounded once."""
    return linear(x.float(), weight, bias).to(x.dtype)


def widen(model: nn.Module) -> None:
    """Let every linear layer multiply so; states, KV cache and attention stay in bfloat16, weights have its values."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight, bias = module.weight.float(), None if module.bias is None else module.bias.float()
            module.forward = partial(product, weight=weight, bias=bias)  # type: ignore[method-assign]


def rates() -> dict[str, float]:
    """FLOP/s of a product on torch's own kernel for bfloat16, and of ours."""
    x, weight = torch.randn(QUERIES // 2, HIDDEN).bfloat16(), torch.randn(INNER, HIDDEN).bfloat16()
    wide = weight.float()
    with torch.inference_mode():
        seconds = take_turns({"own": lambda: linear(x, weight), "float32": lambda: product(x, wide, None)}, 3)
    return {name: 2 * x.shape[0] * weight.numel() / summary(each)["median"] for name, each in seconds.items()}


def section(data: dict[str, Any], docs: Path) -> list[str]:
    """The table, and how fast a product is either way."""
    own, ours = (data["rates"][name] / 1e9 for name in ("own", "float32"))
    return [
        f"Torch's own kernel for products in bfloat16 reaches {own:.0f} GFLOP/s on this CPU, which has no instructions for",
        f"them; with states widened to float32 and results rounded once it is {ours:.0f}. Here both arms multiply so, with",
        "weights widened beforehand; states, KV cache and attention are in bfloat16. So it is where products are not",
        "slower than attention, as on machines with instructions for bfloat16.",
        "",
        *rows_table(data),
    ]
