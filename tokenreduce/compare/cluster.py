"""The same work on a Ray cluster: workers may die, and what they had in hand is given to others."""

from __future__ import annotations

import importlib
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from tokenreduce.compare.settings import Settings
from tokenreduce.compare.store import Unit
from tokenreduce.compare.worker import Done, Worker
from tokenreduce.errors import TokenReduceError, plain

LOCAL = "local"
CLIENT_PORT = 10001
"""Where ray://host leads."""
REACHED_WITHIN = 5.0
"""Seconds in which a cluster must answer."""
ATTEMPTS = 3
"""Workers that may die over one example before the comparison gives up."""


def run_on_ray(
    settings: Settings, units: Sequence[Unit], pictures: int, address: str, gpus_per_worker: int = 1
) -> Iterator[Done]:
    """Results of `units`, as they come. address: of a cluster, `auto` for the one at hand, `local` to start one.

    One worker per CPU of the cluster, each with a copy of the model. Where the cluster has GPUs, each worker reserves
    `gpus_per_worker` of them and loads onto those that it was given. tokenreduce must
    be installed on every node.

    Raises TokenReduceError where Ray is not installed or not reached, or where an example kills its
    worker ATTEMPTS times; errors of the work itself are raised as they are.
    """
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        _refuse_unreachable(address)
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False if address == LOCAL else None)
        except (ConnectionError, ValueError, OSError, RuntimeError) as error:
            raise TokenReduceError(
                f"--ray {address}: no cluster there ({' '.join(str(error).split())[:200]})"
            ) from None
    try:
        yield from _dispatch(ray, settings, deque(units), pictures, gpus_per_worker)
    finally:
        if ours:
            ray.shutdown()


def _dispatch(
    ray: Any, settings: Settings, waiting: deque[Unit], pictures: int, gpus_per_worker: int
) -> Iterator[Done]:
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 1)))
    if gpus and gpus < gpus_per_worker:
        raise TokenReduceError(f"--gpus-per-worker {gpus_per_worker}: the cluster has {gpus} GPUs in all")
    settings = placed(settings, gpus, gpus_per_worker)
    on_gpus = gpus and settings.loading.get("device") != "cpu"
    places = min(gpus // gpus_per_worker if on_gpus else cpus, len(waiting))
    remote = ray.remote(num_cpus=1, num_gpus=gpus_per_worker if on_gpus else 0)(_Actor)
    idle = [remote.remote(settings, pictures) for _ in range(places)]
    busy: dict[Any, tuple[Any, Unit]] = {}
    deaths: dict[Unit, int] = {}
    while waiting or busy:
        while waiting and idle:
            worker, unit = idle.pop(), waiting.popleft()
            busy[worker.run.remote(unit)] = (worker, unit)
        ready, _ = ray.wait(list(busy))
        worker, unit = busy.pop(ready[0])
        try:
            done = ray.get(ready[0])
        except ray.exceptions.RayActorError:
            deaths[unit] = deaths.get(unit, 0) + 1
            if deaths[unit] == ATTEMPTS:
                raise TokenReduceError(
                    f"example {unit[1]} of {unit[0]} ended {ATTEMPTS} workers; is there enough memory?"
                ) from None
            waiting.appendleft(unit)
            idle.append(remote.remote(settings, pictures))
            continue
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        idle.append(worker)
        yield done


def placed(settings: Settings, gpus: int, gpus_per_worker: int) -> Settings:
    """`settings` for workers that see only the GPUs that they reserved: a model goes onto the first, or is spread over all.

    gpus: of the cluster. Raises TokenReduceError for a device with a number, which would be another one in each worker.
    """
    device = settings.loading.get("device", "")
    if ":" in device:
        raise TokenReduceError(
            f"--device {device} with --ray: each worker is given devices of its own; leave the number out"
        )
    if gpus and gpus_per_worker > 1 and not device and "device_map" not in settings.loading:
        return replace(settings, loading={**settings.loading, "device_map": "auto"})
    return settings


class _Actor:
    """A worker process."""

    def __init__(self, settings: Settings, pictures: int) -> None:
        torch.set_num_threads(1)
        self.worker = Worker(settings, settings.open_task(), pictures)

    def run(self, unit: Unit) -> Done:
        """See `Worker`."""
        return self.worker.run(unit)


def _refuse_unreachable(address: str) -> None:
    """Ask within seconds what Ray would wait for over a minute. TokenReduceError where nobody listens at host:port."""
    if address in (LOCAL, "auto"):
        return
    bare = address.removeprefix("ray://")
    host, colon, port = (bare if ":" in bare or bare == address else f"{bare}:{CLIENT_PORT}").rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise TokenReduceError(f"--ray {plain(address)[:80]}: expected `{LOCAL}`, `auto` or host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACHED_WITHIN).close()
    except (OSError, UnicodeError) as error:
        raise TokenReduceError(
            f"--ray {plain(address)[:80]}: no cluster there ({getattr(error, 'strerror', None) or error})"
        ) from None


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise TokenReduceError("--ray needs an optional package: pip install ray") from None
