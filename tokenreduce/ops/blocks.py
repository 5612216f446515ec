"""How many rows to work on at once."""

from __future__ import annotations

from torch import Tensor

ELEMENTS = 1 << 19
"""Of a block on a CPU: its float32 copies stay in the cache. Elsewhere blocks are larger, so that they are few."""
LARGER = 32


def block_rows(rows: Tensor) -> int:
    """Rows of (n, D) whose full-precision copies make one block."""
    return max(ELEMENTS * (1 if rows.device.type == "cpu" else LARGER) // max(rows.shape[-1], 1), 1)
