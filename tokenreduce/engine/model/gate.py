"""Waiting for forwards of other threads, so that a hook is not taken off in the middle of one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tokenreduce.errors import AttachError

PATIENCE = 60.0
"""Seconds that `detach` waits for a forward that runs in another thread."""


class Gate:
    """What forwards pass when they begin. Shut while a pipeline is taken off: then they wait, and begin without it.

    lock: held while one begins or ends.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._opened = threading.Condition(self.lock)
        self._shut = False

    def passed(self) -> None:
        """Wait until it is open. The caller holds the lock."""
        while self._shut:
            self._opened.wait()

    def set(self, shut: bool) -> None:
        """Shut or open it."""
        with self.lock:
            self._shut = shut
            self._opened.notify_all()


def any_other(works: Callable[[int], bool]) -> bool:
    """Whether another living thread works. works: of a thread's identifier."""
    others = (thread.ident for thread in threading.enumerate() if thread.ident != threading.get_ident())
    return any(works(ident) for ident in others if ident is not None)


def wait_until(done: Callable[[], bool], pipeline: str) -> None:
    """Try `done` until it says that it is; AttachError if forwards of other threads never let it."""
    until = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > until:
            raise AttachError(
                f"pipeline {pipeline} cannot be detached: a forward of another thread has not ended in {PATIENCE:.0f} s"
            )
        time.sleep(0.002)
