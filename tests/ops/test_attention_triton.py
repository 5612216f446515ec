"""The GPU kernels of importance against plain torch, in Triton's interpreter: no GPU is needed, and none has been used."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.triton_worker import CASES

import tokenreduce.ops.attention as attention_ops

WORKER = Path(__file__).parents[1] / "support" / "triton_worker.py"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton: the extra `gpu`, or `dev` on Linux"
)


def run(what: str, cache: Path) -> list[Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, str(WORKER), what], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_triton
def test_interpreted_kernels_equal_plain_torch(tmp_path: Path) -> None:
    """Lengths beside the block, grouped heads, keys of earlier turns, all types; last, window and all queries."""
    lines = run("interpret", tmp_path)
    assert {tuple(line[:6]) for line in lines} == set(CASES)
    assert {line[6] for line in lines} >= {1, 32, 64, 70}
    for heads, _, _, m, *_, dtype, shape, error in lines:
        assert (dtype, shape) == ("torch.float32", [heads, m])
        assert error < 1e-5


@pytest.mark.slow
@needs_triton
def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """For compute capability 8.0, in bfloat16, which the interpreter cannot multiply; within the memory of a block."""
    for _, size, shared in run("compile", tmp_path):
        assert size > 0
        assert shared <= 64 << 10


def test_without_a_kernel_plain_torch_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not installed, not for this type or width, or failing: then with a warning."""
    calls = []

    def gpu_column_sums(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) > 1:
            raise RuntimeError("out of resources")
        return torch.ones(2, 5)

    kernels = SimpleNamespace(DTYPES=(torch.float32,), MAX_WIDTH=16, gpu_column_sums=gpu_column_sums)
    q, k = torch.randn(2, 5, 8), torch.randn(1, 5, 8)
    monkeypatch.setattr(attention_ops, "_kernels", lambda: None)
    assert attention_ops._gpu_sums(q, k, 1.0, 5) is None
    monkeypatch.setattr(attention_ops, "_kernels", lambda: kernels)
    assert attention_ops._gpu_sums(q.double(), k.double(), 1.0, 5) is None
    wide = torch.randn(2, 5, 32)
    assert attention_ops._gpu_sums(wide, wide, 1.0, 5) is None
    assert not calls
    assert torch.equal(attention_ops._gpu_sums(q, k, 1.0, 5), torch.ones(2, 5))
    with pytest.warns(UserWarning, match="plain torch: its GPU kernel failed: RuntimeError.'out of resources'"):
        assert attention_ops._gpu_sums(q, k, 1.0, 5) is None


def test_cpu_tensors_never_meet_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_ops, "_gpu_sums", lambda *_: pytest.fail("a kernel for a CPU tensor"))
    assert attention_ops.importance(torch.randn(2, 5, 8), torch.randn(1, 5, 8), 1.0, 5).shape == (5,)
