"""How many rows to work on at once. Does not load torch: a plan counts in the same blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ELEMENTS = 1 << 19
"""Of a block on a CPU: its float32 copies stay in the cache. Elsewhere blocks are larger, so that they are few."""
LARGER = 32
SCORES = 1 << 21
"""Scores that all heads have for the queries of one block: 8 MiB of float32, which stay in the cache."""
LEAST_QUERIES = 32
"""Of a block: with fewer, a long sequence's keys are read from memory more often than they are used."""


def block_rows(rows: Tensor) -> int:
    """Rows of (n, D) whose full-precision copies make one block."""
    return max(ELEMENTS * (1 if rows.device.type == "cpu" else LARGER) // max(rows.shape[-1], 1), 1)


def block_columns(rows: Tensor) -> int:
    """Columns of (n, D) whose full-precision copies make one block; wide enough that no row is read in crumbs."""
    return max(8 * ELEMENTS * (1 if rows.device.type == "cpu" else LARGER) // max(rows.shape[0], 1), 64)


def query_block(heads: int, keys: int, queries: int) -> int:
    """Queries of a block of whole rows of scores, where there are `queries` of them."""
    return max(1, min(queries, max(LEAST_QUERIES, SCORES // max(heads * keys, 1))))
