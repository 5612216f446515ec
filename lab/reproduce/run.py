"""The work of a reproduction, spread over processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence

import torch

from lab.reproduce.measure import Row, Unit, Worker
from lab.reproduce.plan import FIRST, ONE_HOP, pipeline
from lab.reproduce.rows import Rows
from tokenreduce.compare.arms import BASELINE, Arm
from tokenreduce.compare.checks import Check, check_model
from tokenreduce.compare.measure import Bench

_worker: Worker | None = None


def run(units: Sequence[Unit], rows: Rows, model: str, seed: int, workers: int, tell: Callable[[int], None]) -> None:
    """Run `units` in `workers` processes of one thread each, adding to `rows`. tell: called with rows just finished."""
    if not units:
        return
    if workers == 1:
        worker = Worker(model, seed)
        for unit in units:
            _keep(rows, worker.run(unit), tell)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _start, (model, seed)) as pool:
        for done in pool.imap_unordered(_run, units):
            _keep(rows, done, tell)


def _keep(rows: Rows, done: list[Row], tell: Callable[[int], None]) -> None:
    rows.append(done)
    tell(len(done))


def _start(model: str, seed: int) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = Worker(model, seed)


def _run(unit: Unit) -> list[Row]:
    assert _worker is not None
    return _worker.run(unit)


def honesty(model: str, seed: int) -> list[Check]:
    """Dense equals the unattached model, and budget 1 equals dense, bit for bit; raises where they do not."""
    arms = [Arm(name, name.partition("@")[0], model, pipeline(name, 16)) for name in FIRST]
    bench = Bench(model, arms, 1, frame_times=False)
    assert arms[0].name == BASELINE
    return check_model(bench, ONE_HOP.task(seed).item(0))
