"""Two processes share a model's attention heads: they must keep the same tokens, those that one process keeps."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tensor_parallel_worker import PIPELINES
from support.tiny import tiny_config, tiny_model

from tokenreduce.engine.model.parallel import head_group, total_heads

WORKER = Path(__file__).parents[1] / "support" / "tensor_parallel_worker.py"
SEEDS = range(3)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process computes, then what each of two ranks does."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    tiny_model().save_pretrained(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks: list[dict[str, str]] = [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for rank in range(2)
    ]
    running = []
    for number, variables in enumerate([{}, *ranks]):
        path = os.pathsep.join([str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}
        command = [sys.executable, str(WORKER), str(folder / "model"), str(folder / f"{number}.pt")]
        running.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        for process in running:
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, said
    finally:
        for process in running:
            process.kill()
    return [torch.load(folder / f"{number}.pt") for number in range(3)]


def test_ranks_hold_half_of_the_heads(outcomes: list[dict[str, Any]]) -> None:
    heads = [outcome["fastv.0"]["local_heads"] for outcome in outcomes]
    assert heads == [4, 2, 2]


def test_parameters_that_are_only_stored_in_shards() -> None:
    """FSDP gathers them before use: every rank has all heads, of inputs of its own, and nothing may be summed up."""
    config, group = tiny_config(), object()
    assert total_heads(4, config, group) == 4
    assert total_heads(2, config, group) == 4
    assert total_heads(2, config, None) == 2
    assert head_group(tiny_model().model.layers[0]) is None


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PIPELINES)
def test_ranks_agree_with_one_process(outcomes: list[dict[str, Any]], name: str, seed: int) -> None:
    alone, *ranks = (outcome[f"{name}.{seed}"] for outcome in outcomes)
    assert len(alone["kept"]) < alone["source"].shape[1]
    for rank in ranks:
        for exact in ("kept", "source", "tokens", "sequence"):
            assert torch.equal(rank[exact], alone[exact]), exact
        assert rank["selector_flops"] == alone["selector_flops"]
        assert rank["flops"] == alone["flops"]
        torch.testing.assert_close(rank["prefill"], alone["prefill"], atol=1e-5, rtol=0)
        torch.testing.assert_close(rank["logits"], alone["logits"], atol=1e-5, rtol=0)
    for name, value in ranks[0].items():
        same = torch.equal(value, ranks[1][name]) if isinstance(value, torch.Tensor) else value == ranks[1][name]
        assert same, f"the ranks differ in {name}"
