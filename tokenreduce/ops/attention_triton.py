"""Column sums of the causal softmax matrix on a GPU: two Triton kernels, the first for each row's log-sum-exp.

Held to the plain torch code of `attention.py` under Triton's interpreter, on CPU tensors. It has never run on a GPU.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 256
LENGTHS = ["first", "n", "m", "share"]
LOG2_E = math.log2(math.e)


@triton.jit
def _scores(
    q, k, scale, rows, columns, offset, n, m, q_row, q_column, k_row, k_column,
    width: tl.constexpr, padded: tl.constexpr, widen: tl.constexpr,
):  # fmt: skip
    """Scores in bits (base 2) of queries `rows` and keys `columns`, −inf where a key is later than its query."""
    lanes = tl.arange(0, padded)
    inside = lanes < width
    # 64 bits: a million tokens of 28 heads of 128 lie further apart than 32 bits count.
    q += rows.to(tl.int64)[:, None] * q_row + lanes[None, :] * q_column
    k += columns.to(tl.int64)[None, :] * k_row + lanes[:, None] * k_column
    left = tl.load(q, mask=(rows < n)[:, None] & inside[None, :], other=0.0)
    right = tl.load(k, mask=(columns < m)[None, :] & inside[:, None], other=0.0)
    if widen:
        left, right = left.to(tl.float32), right.to(tl.float32)
    products = tl.dot(left, right, input_precision="ieee") * scale
    seen = (columns[None, :] <= rows[:, None] + offset) & (columns < m)[None, :]
    return tl.where(seen, products, float("-inf"))


@triton.jit(do_not_specialize=LENGTHS)
def _row_kernel(
    q, k, lse, scale, first, n, m, share, q_head, q_row, q_column, k_head, k_row, k_column,
    width: tl.constexpr, padded: tl.constexpr, block: tl.constexpr, widen: tl.constexpr,
):  # fmt: skip
    """lse[head, row − first]: log2 of the sum of 2**score over the keys that a block of rows sees."""
    head = tl.program_id(1).to(tl.int64)
    rows = first + tl.program_id(0) * block + tl.arange(0, block)
    q += head * q_head
    k += (head // share) * k_head
    offset = m - n
    # Key 0 is seen by every row: the maximum is finite after the first block.
    most = tl.full([block], float("-inf"), tl.float32)
    total = tl.zeros([block], tl.float32)
    end = tl.minimum(m, first + (tl.program_id(0) + 1) * block + offset)
    for start in range(0, end, block):
        columns = start + tl.arange(0, block)
        scores = _scores(
            q, k, scale, rows, columns, offset, n, m, q_row, q_column, k_row, k_column, width, padded, widen
        )
        higher = tl.maximum(most, tl.max(scores, 1))
        total = total * tl.exp2(most - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        most = higher
    tl.store(lse + head * (n - first) + rows - first, most + tl.log2(total), mask=rows < n)


@triton.jit(do_not_specialize=LENGTHS)
def _column_kernel(
    q, k, lse, sums, scale, first, n, m, share, q_head, q_row, q_column, k_head, k_row, k_column,
    width: tl.constexpr, padded: tl.constexpr, block: tl.constexpr, widen: tl.constexpr,
):  # fmt: skip
    """sums[head, column]: shares of the rows `first` … n − 1 in a block of columns. One program owns a block: no atomics."""
    head = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * block + tl.arange(0, block)
    q += head * q_head
    k += (head // share) * k_head
    offset = m - n
    received = tl.zeros([block], tl.float32)
    # Rows before the first column's own do not see this block.
    begin = tl.maximum(first, tl.program_id(0) * block - offset)
    for start in range(begin, n, block):
        rows = start + tl.arange(0, block)
        scores = _scores(
            q, k, scale, rows, columns, offset, n, m, q_row, q_column, k_row, k_column, width, padded, widen
        )
        known = tl.load(lse + head * (n - first) + rows - first, mask=rows < n, other=float("inf"))
        received += tl.sum(tl.exp2(scores - known[:, None]), 0)
    tl.store(sums + head * m + columns, received, mask=columns < m)


def gpu_column_sums(q: Tensor, k: Tensor, scale: float, queries: int) -> Tensor:
    """(H, m) float32: `attention.column_sums` for q (H, n, d) and k (G, m, d) of one of DTYPES, d ≤ MAX_WIDTH."""
    heads, n, width = q.shape
    groups, m, _ = k.shape
    lse = torch.empty(heads, queries, dtype=torch.float32, device=q.device)
    sums = torch.empty(heads, m, dtype=torch.float32, device=q.device)
    padded = max(16, triton.next_power_of_2(width))
    block = 64 if padded * q.element_size() <= 256 else 32
    facts: tuple[Any, ...] = (scale * LOG2_E, n - queries, n, m, heads // groups, *q.stride(), *k.stride())
    # A CPU tensor means the interpreter, which cannot multiply bfloat16.
    facts += (width, padded, block, q.dtype == torch.bfloat16 and not q.is_cuda)
    # Triton launches on the current device, which need not be the tensors': layers may lie on several.
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        _row_kernel[triton.cdiv(queries, block), heads](q, k, lse, *facts)
        _column_kernel[triton.cdiv(m, block), heads](q, k, lse, sums, *facts)
    return sums
