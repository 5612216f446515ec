"""Peak memory of a piece of code: the process's resident set on CPU, torch's own account on CUDA, of all GPUs in use."""

from __future__ import annotations

import ctypes
import resource
import sys
import threading
from pathlib import Path
from types import TracebackType

import torch

from tokenreduce.compare.clock import cuda_devices

STATM = Path("/proc/self/statm")
EVERY = 0.001
"""Seconds between two looks at the resident set."""


def resident_bytes() -> int:
    """Resident set of this process; where the system does not tell it, the highest it has ever been."""
    try:
        return int(STATM.read_text().split()[1]) * resource.getpagesize()
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


class PeakMemory:
    """Context manager. peak: bytes at the highest moment. growth: bytes above the level at entry.

    On CPU a thread looks every millisecond, which slows other work a little: do not time what runs inside.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before: dict[torch.device, int] = {}
        self.peak = self.growth = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            self._before = {gpu: torch.cuda.memory_allocated(gpu) for gpu in cuda_devices()}
            for gpu in self._before:
                torch.cuda.reset_peak_memory_stats(gpu)
            self._start = sum(self._before.values())
            return self
        _give_back()
        self._start = self.peak = resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.peak = sum(torch.cuda.max_memory_allocated(gpu) for gpu in cuda_devices())
        else:
            self._done.set()
            self._thread.join()
            self.peak = max(self.peak, resident_bytes())
        self.growth = self.peak - self._start

    def _watch(self) -> None:
        while not self._done.wait(EVERY):
            self.peak = max(self.peak, resident_bytes())


def _give_back() -> None:
    """Ask glibc to return freed memory, so that growth is counted from what is in use."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return
