"""What commands say beside their results, on stderr: errors, warnings, the library's log, and progress."""

from __future__ import annotations

import logging
import sys
import threading

from tokenreduce.cli._output import print_prose


class Voice:
    """One per process. `--quiet` leaves errors alone; `--verbose` adds what the library logs."""

    def __init__(self) -> None:
        self.quiet = False
        self.live = False
        """Whether a line of progress may stand on the terminal, to be wiped out first."""
        self._turn = threading.RLock()

    def say(self, text: str) -> None:
        """A line; on a terminal it breaks at words."""
        with self._turn:
            if self.live:
                self.write("\r\x1b[K")
            print_prose(text, file=sys.stderr, indent="  ")
            sys.stderr.flush()

    def write(self, text: str) -> None:
        """Text as it is."""
        with self._turn:
            sys.stderr.write(text)
            sys.stderr.flush()


voice = Voice()
"""The one that all commands use."""


class Said(logging.Handler):
    """Hands records of the library's loggers to the voice."""

    def emit(self, record: logging.LogRecord) -> None:
        voice.say(f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}")


def log_level(quiet: bool, verbose: bool) -> int:
    """The level from which the library's log is shown."""
    return logging.ERROR if quiet else logging.DEBUG if verbose else logging.WARNING
