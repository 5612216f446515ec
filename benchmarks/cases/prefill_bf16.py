"""As `prefill`, in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from harness import HIDDEN, Options

from cases.prefill import LAYERS, Setting, rows_table, setting_rows

TITLE = f"Prefill in bfloat16: {LAYERS} layers of width {HIDDEN}"
SETTINGS: tuple[Setting, ...] = ((20, torch.bfloat16, (0.3,), 1), (40, torch.bfloat16, (0.3,), 1))
QUICK: tuple[Setting, ...] = ((1, torch.bfloat16, (0.7,), 1),)


def measure(options: Options) -> dict[str, Any]:
    """One turn of each setting."""
    rows = [
        row
        for setting in (QUICK if options.quick else SETTINGS)
        for row in setting_rows(*setting, ("framefusion", "fastv"))
    ]
    return {"layers": LAYERS, "rows": rows}


def section(data: dict[str, Any], docs: Path) -> list[str]:
    """The table."""
    return [
        "A CPU without instructions for bfloat16 computes its matrix products in software, several times slower than fp32; the",
        "ratio holds all the same.",
        "",
        *rows_table(data),
    ]
