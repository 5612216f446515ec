"""What is asked in a comparison: a task, its examples, and how replies to them are read."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenreduce.testbed.questions import Question

LONG_ANSWER = 32
"""Tokens of an answer at most, where a task does not say otherwise."""


@dataclass(frozen=True)
class Item:
    """One example."""

    id: str
    """Names the example in rows and messages."""
    video: NDArray[np.uint8] | Path
    """Frames (F, H, W, 3) uint8 RGB, or a file."""
    turns: tuple[tuple[str, str], ...]
    """(question, right answer) of each turn; the last one is scored."""
    expected: str
    """The right answer in the form that `read` gives."""
    options: tuple[str, ...] = ()
    """The choices, in the order of their letters; empty for a free answer."""
    question: Question | None = None
    """Reads replies in place of our own rules, where there is one."""
    cell: dict[str, float] = field(default_factory=dict)
    """Where the example lies in a grid of conditions, by the condition's name."""
    shown: tuple[int, ...] = ()
    """Frames that pictures of the example should have."""

    def read(self, reply: str) -> str:
        """What a reply says; equal to `expected` if it is right."""
        if self.question is not None:
            return " ".join(self.question.read(reply))
        return read_choice(reply, self.options) if self.options else read_free(reply, self.expected)


class Task(ABC):
    """A source of examples; example `index` is always the same."""

    name: str
    """What a user calls it by."""
    new_tokens = LONG_ANSWER
    """Tokens of an answer at most."""
    frame_times = True
    """Whether the prompt may tell the times of the frames."""
    size: int | None = None
    """How many examples there are, None for any number."""

    @abstractmethod
    def item(self, index: int) -> Item:
        """Example `index`. Raises MediaError where its video cannot be read."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that decides what the examples are, as plain data."""


def prompt_with_options(question: str, options: Sequence[str]) -> str:
    """A multiple-choice question as VideoMME and its kin put it."""
    if not options:
        return question
    lines = [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options)]
    return "\n".join([question, *lines, "Answer with the option's letter from the given choices directly."])


def read_choice(reply: str, options: Sequence[str]) -> str:
    """The letter of the option that a reply names: a letter on its own, else an option's own words; "" for none."""
    letters = [chr(ord("A") + i) for i in range(len(options))]
    named = re.match(r"\W*(?:option|answer|the answer is)?\W*([A-Z])(?:\W|$)", reply.strip(), re.IGNORECASE)
    if named and named[1].upper() in letters:
        return named[1].upper()
    words = f" {normal(reply)} "
    found = [letter for letter, option in zip(letters, options, strict=True) if f" {normal(option)} " in words]
    return found[0] if len(found) == 1 else ""


def read_free(reply: str, expected: str) -> str:
    """`expected` where a reply contains its words in a row, else the reply's own words."""
    said = normal(reply)
    return expected if f" {expected} " in f" {said} " else said


def normal(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    words = re.findall(r"\w+", text.lower())
    return " ".join(word for word in words if word not in ("a", "an", "the"))
