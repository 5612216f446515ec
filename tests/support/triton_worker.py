"""Runs the Triton kernels: `interpret` them on CPU tensors beside plain torch, or `compile` them for a GPU that is not there.

A process of its own, because Triton looks for TRITON_INTERPRET when it is imported. Prints a line of JSON for each case.
"""

from __future__ import annotations

import json
import os
import sys

CASES = [
    # heads, groups, queries, keys, width, type
    (2, 1, 1, 1, 8, "float32"),
    (2, 2, 70, 70, 16, "float32"),
    (4, 2, 64, 128, 24, "float32"),
    (2, 1, 67, 131, 64, "bfloat16"),
    (2, 1, 20, 90, 80, "float16"),
    (1, 1, 33, 65, 256, "bfloat16"),
]


def interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from tokenreduce.ops.attention import column_sums as plain
    from tokenreduce.ops.attention_triton import gpu_column_sums

    for heads, groups, n, m, width, name in CASES:
        torch.manual_seed(m)
        dtype = getattr(torch, name)
        # The engine's own strides: heads are the second axis of (n, H, d).
        q = torch.randn(n, heads, width).to(dtype).transpose(0, 1)
        k = torch.randn(m, groups, width).to(dtype).transpose(0, 1)
        for queries in sorted({1, min(32, n), n}):
            got, expected = gpu_column_sums(q, k, 0.3, queries), plain(q.double(), k.double(), 0.3, queries)
            error = float((got.double() - expected).abs().max())
            print(json.dumps([heads, groups, n, m, width, name, queries, str(got.dtype), list(got.shape), error]))


def compile_() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tokenreduce.ops import attention_triton as kernels

    fixed = {"width": 128, "padded": 128, "block": 64, "widen": False}
    types = {"q": "*bf16", "k": "*bf16", "lse": "*fp32", "sums": "*fp32", "scale": "fp32"}
    for kernel in (kernels._row_kernel, kernels._column_kernel):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
        values = {(names.index(name),): value for name, value in fixed.items()}
        binary = triton.compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", 80, 32))
        print(json.dumps([kernel.__name__, len(binary.asm["cubin"]), binary.metadata.shared]))


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_}[sys.argv[1]]()
