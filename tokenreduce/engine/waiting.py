"""Waiting for forwards of other threads, so that a hook is not taken off in the middle of one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tokenreduce.errors import AttachError

PATIENCE = 60.0
"""Seconds that `detach` waits for a forward that runs in another thread."""


def wait_for_others(works: Callable[[int | None], bool], pipeline: str) -> None:
    """Wait until no other living thread works; AttachError if one does not end. works: of a thread's identifier."""
    until, own = time.monotonic() + PATIENCE, threading.get_ident()
    while any(works(thread.ident) for thread in threading.enumerate() if thread.ident != own):
        if time.monotonic() > until:
            raise AttachError(
                f"pipeline {pipeline} cannot be detached: a forward of another thread has not ended in {PATIENCE:.0f} s"
            )
        time.sleep(0.002)
