"""What stands between a command and its terminal: streams that take any text, a net for what nobody expected.

Names and replies are written by others, so that control characters in them are shown, never sent to the terminal.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tokenreduce.errors import one_line, plain

DEBUG = "--debug"
"""Anywhere among the arguments: the traceback of an unexpected error."""
_PLAINER = str.maketrans(
    {"×": "x", "–": "-", "—": "-", "−": "-", "…": "...", "→": "->", "’": "'", "“": '"', "”": '"', "±": "+/-"}
)
_BLOCKS = "▏▎▍▌▋▊▉█"


def _spelled(error: UnicodeError) -> tuple[str | bytes, int]:
    """For encodings without a character: something like it, else its escape."""
    assert isinstance(error, UnicodeEncodeError)
    text = "".join("#" if each in _BLOCKS else each for each in error.object[error.start : error.end])
    text = text.translate(_PLAINER)
    return text.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error("tokenreduce", _spelled)


def guarded(command: Callable[[list[str]], int], arguments: list[str] | None) -> int:
    """The exit code of `command`. Errors it does not know itself become one line: 2 for the system's, 1 for bugs of ours."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = DEBUG in given
    if not _open_streams():
        print("error: stdout is closed; send it somewhere, such as > /dev/null", file=sys.stderr)
        return 2
    try:
        with _reserved_for_json("--json" in given):
            code = command([argument for argument in given if argument != DEBUG])
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return _unread()
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        line, code = f"{where}{error.strerror or one_line(error)}", 2
        if error.errno == errno.ENOSPC and error.filename is None:
            line = f"stdout, or another file that was being written, is full: {line}"
        _to_nowhere()
    except MemoryError as error:
        line, code = f"out of memory ({one_line(error)}); ask for fewer frames, or a smaller model", 2
    except BaseException as error:
        if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):  # click's own way out
            return _unread()
        if type(error).__name__ == "OutOfMemoryError":
            line, code = f"out of memory ({one_line(error, 200)}); ask for fewer frames, or a smaller model", 2
        else:
            place = traceback.extract_tb(error.__traceback__)[-1]
            line = f"unexpected {one_line(error)} ({place.name} in {os.path.basename(place.filename)}:{place.lineno})"
            line, code = f"{line}; this is a bug: report it with what {DEBUG} shows", 1
    with suppress(OSError):  # Where stderr is full too, the exit code is all that can be said.
        if debug:
            traceback.print_exc()
        print(f"error: {plain(line)}", file=sys.stderr)
    return code


def _open_streams() -> bool:
    """Make both streams take any text. False where stdout is closed; nothing else may then become file descriptor 1."""
    closed = sys.stdout is None
    if closed:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="tokenreduce")
    return not closed


def _unread() -> int:
    """Whoever read our output has gone; Python would complain once more when it flushes at exit."""
    _to_nowhere()
    return 1


def _to_nowhere() -> None:
    """Send what stdout still holds to nowhere."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return


@contextmanager
def _reserved_for_json(wanted: bool) -> Iterator[None]:
    """While a command that prints JSON runs, stdout takes that alone: what anybody else prints goes to stderr."""
    if not wanted:
        yield
        return
    real: Any = sys.stdout
    sys.stdout = _JsonOnly(real)
    try:
        yield
    finally:
        sys.stdout = real


class _JsonOnly(io.TextIOBase):
    """Stands in for stdout: hands what it gets to stderr, but for `result`."""

    def __init__(self, real: Any) -> None:
        self.real = real

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(self.real.encoding)

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def result(self, text: str) -> None:
        """What the command was asked for."""
        self.real.write(text)

    def flush(self) -> None:
        self.real.flush()
