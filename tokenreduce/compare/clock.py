"""The one clock: it tells the time when everything that was asked of any device is done."""

from __future__ import annotations

import time

import torch


def cuda_devices() -> list[torch.device]:
    """The GPUs that work was sent to by this process. A look at another one would make a context there, of hundreds of MiB."""
    if not torch.cuda.is_available():
        return []
    numbers = range(torch.cuda.device_count())
    return [torch.device("cuda", n) for n in numbers if torch._C._cuda_hasPrimaryContext(n)]  # type: ignore[attr-defined]


def now(device: torch.device) -> float:
    """Seconds, when everything asked of all devices is done: a model's layers may lie on several.

    device: of the inputs. Kernels run after the call that asks for them: a clock that does not wait charges them to whoever waits
    next.
    """
    for gpu in cuda_devices():
        torch.cuda.synchronize(gpu)
    if device.type in ("mps", "xpu"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter()
