"""What a forward holds while it runs, so that no other thread takes a hook off in the middle of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from tokenreduce.errors import AttachError

PATIENCE = 60.0
"""Seconds that `detach` waits for a forward that runs in another thread."""

Part = Literal["decoder", "tower"]
"""Of the model, what runs. Each has hooks of its own at its begin and at its end."""


class Leases:
    """The leases of one attachment: one for each part of the model that runs in a thread.

    torch tells of no end where KeyboardInterrupt or SystemExit broke a forward off. Its lease goes with the next forward in its
    thread, with `alone` in its thread, or with the thread.
    """

    closed: bool
    """The pipeline has been taken off."""

    def __init__(self) -> None:
        self.closed = False
        self._changed = threading.Condition(threading.Lock())
        self._holders: dict[tuple[int, Part], threading.Thread] = {}
        self._detaching = 0

    def hold(self, part: Part) -> bool:
        """A call of `part` begins in this thread; it waits while another detaches. False: its hooks were there still, but the
        pipeline is not."""
        thread = threading.current_thread()
        ident = threading.get_ident()
        with self._changed:
            while self._detaching and not self._in_thread(
                ident
            ):  # What is called within a forward would wait for itself.
                self._changed.wait()
            if part == "decoder":
                self._holders.pop((ident, "tower"), None)  # It has ended, or was broken off.
            if not self.closed:
                self._holders[ident, part] = thread
            return not self.closed

    def end(self, part: Part) -> None:
        """What this thread held of `part` is held no more."""
        with self._changed:
            if self._holders.pop((threading.get_ident(), part), None) is not None and self._detaching:
                self._changed.notify_all()

    def in_this_thread(self) -> bool:
        """Whether a forward of this thread runs, or was broken off."""
        with self._changed:
            return self._in_thread(threading.get_ident())

    @contextmanager
    def alone(self, pipeline: str) -> Iterator[None]:
        """A block in which no other thread runs a forward. What begins meanwhile waits, and goes on without the pipeline.

        Raises AttachError where another thread's forward has not ended after PATIENCE seconds.
        """
        with self._changed:
            self._detaching += 1
            try:
                if not self._changed.wait_for(self._only_this_thread, PATIENCE):
                    raise AttachError(
                        f"pipeline {pipeline} cannot be detached: a forward of another thread has not ended in {PATIENCE:.0f} "
                        "s; detach when it has ended, or, where it was broken off, in its own thread"
                    )
                yield
                self.closed = True
                self._holders.clear()
            finally:
                self._detaching -= 1
                self._changed.notify_all()

    def _in_thread(self, ident: int) -> bool:
        return (ident, "decoder") in self._holders or (ident, "tower") in self._holders

    def _only_this_thread(self) -> bool:
        mine = threading.current_thread()
        return not any(thread is not mine and thread.is_alive() for thread in self._holders.values())
