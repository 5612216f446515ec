"""Progress of long work, on stderr: a line that changes on a terminal, and a plain line from time to time anywhere else."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tokenreduce.cli._output import terminal_width
from tokenreduce.cli._voice import voice

REDRAW = 0.5
"""Seconds between two states of the line on a terminal."""
FIRST, EVERY = 10.0, 60.0
"""Seconds before the first plain line, and between two."""


class Progress:
    """How far some work is. Steps that were done before it began tell nothing about its pace."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.doing = ""
        self.unit = ""
        self.done = self.total = self.before = 0
        self.began = time.monotonic()

    def step(self, doing: str) -> None:
        """Another step begins; the steps before it are done."""
        self.done += bool(self.doing)
        self.doing = doing

    def reach(self, done: int, total: int, unit: str = "") -> None:
        """So many of all are done. The first call says how many there were to begin with."""
        if not self.total:
            self.before = done
        self.done, self.total, self.unit = done, total, unit

    def line(self) -> str:
        """`compare: 12 of 200 examples, 0:31 so far, about 8:03 left`."""
        spent = time.monotonic() - self.began
        parts = [f"{self.done} of {self.total}{' ' * bool(self.unit)}{self.unit}"] if self.total else []
        parts += [self.doing] if self.doing else []
        parts.append(f"{_clock(spent)} so far")
        if self.done > self.before and self.total:
            left = spent * (self.total - self.done) / (self.done - self.before)
            parts.append(f"about {_clock(left)} left")
        return f"{self.what}: {', '.join(parts)}"


@contextmanager
def progress(what: str) -> Iterator[Progress]:
    """Show the progress of the block, unless --quiet."""
    state = Progress(what)
    if voice.quiet:
        yield state
        return
    over = threading.Event()
    live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    thread = threading.Thread(target=_draw if live else _log, args=(state, over), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        over.set()
        thread.join()


def _draw(state: Progress, over: threading.Event) -> None:
    voice.live = True
    while not over.wait(REDRAW):
        width = terminal_width(sys.stderr) or 80
        voice.write(f"\r\x1b[K{state.line()[: width - 1]}")
    voice.live = False
    voice.write("\r\x1b[K")


def _log(state: Progress, over: threading.Event) -> None:
    wait = FIRST
    while not over.wait(wait):
        voice.say(state.line())
        wait = EVERY


def _clock(seconds: float) -> str:
    """0:31, or 1:02:07."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
