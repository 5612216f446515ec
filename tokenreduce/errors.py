"""Everything tokenreduce refuses, as one family of exceptions.

Each message is one line that says what is wrong and what to do about it, because the command line prints it as it is
(exit code 2, no traceback).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class TokenReduceError(Exception):
    """Base of every error that a user of tokenreduce can cause and mend."""


class PipelineError(TokenReduceError):
    """A pipeline that cannot be: unknown name or field, wrong type, a layer beyond the model, a missing capability."""


class BudgetError(TokenReduceError):
    """A budget that is not a budget (0, negative, NaN, unknown unit) or that no allowed choice of tokens meets."""


class LayoutError(TokenReduceError):
    """A token layout that contradicts itself or the forward it is used in."""


class UnsupportedError(TokenReduceError):
    """A model, cache, mask or mode that tokenreduce refuses by name, because it could not be exact there."""


class AttachError(TokenReduceError):
    """Attach and detach in an order that has no meaning."""


class NotFiredError(TokenReduceError):
    """A forward had vision tokens in it and a stage of the pipeline never acted: never passed over in silence."""


class PluginError(TokenReduceError):
    """A plugin that is being used and fails, or breaks its contract."""


class MediaError(TokenReduceError):
    """A video or image that cannot be read."""


class CheckpointError(TokenReduceError):
    """A checkpoint folder whose tensors do not map one to one onto the model."""


def call_plugin(who: str, call: Callable[[], T]) -> T:
    """What `call`, the code of a plugin, returns. PluginError in one line where it raises; refusals of ours pass."""
    try:
        return call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit(0) of a plugin would end the program as if all were well.
        line = one_line(error)
        if isinstance(error, TokenReduceError) and "\n" not in str(error):
            raise
        raise PluginError(f"{who} failed: {line}") from error


@contextmanager
def foreign(kind: type[TokenReduceError], what: str) -> Iterator[None]:
    """Around another library's code at work on somebody else's file: what it raises becomes `kind`, `what` and the reason."""
    try:
        yield
    except (TokenReduceError, KeyboardInterrupt):
        raise
    except BaseException as error:  # Panics of tokenizers' Rust are no Exception.
        raise kind(f"{what} ({one_line(error, 200)})") from error


def one_line(error: BaseException, limit: int = 400) -> str:
    """`error` as part of a message: its type and its text, which may have many lines or fail itself."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "its text cannot be had"
    text = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def plain(text: object) -> str:
    """Text for a terminal, in one line, by `printable`."""
    return printable(" ".join(str(text).split()))


def printable(text: str) -> str:
    """Control characters and what turns the direction of writing are shown, not sent to the terminal."""
    return "".join(each if each.isprintable() else _shown(each) for each in text)


def _shown(character: str) -> str:
    return character if character in "\u00a0\u3000" else character.encode("unicode_escape").decode()


def nearest(name: str, known: Iterable[str]) -> str:
    """A remedy for an unknown `name`: `; did you mean 'fastv'?` and the list of what is known."""
    names = sorted(known)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{match[0]}'?" if match else ""
    return f"{hint} (known: {', '.join(names)})" if names else hint
