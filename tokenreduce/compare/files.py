"""Tasks from files: videos with a questions file (JSONL), or a data set that the `datasets` library saved to disk."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from tokenreduce.compare.identity import content_hash
from tokenreduce.compare.tasks import Item, Task, normal, prompt_with_options
from tokenreduce.config.json_source import exists, expanded, parse_json, read_text, shown, validated
from tokenreduce.errors import MediaError, TokenReduceError, one_line

QUESTIONS = "questions.jsonl"
DATASET_FILES = ("dataset_info.json", "dataset_dict.json")
QUESTION_BYTES = 256 * 2**20
"""Of a questions file, at most."""
_BLOB = re.compile(r"/(datasets|models|spaces)--[^/]+/blobs/[0-9a-f]+$")
"""Where the links in a hub's cache lead."""
REQUIRED = ("video", "question", "answer")
MOST_OPTIONS = 26


@dataclass(frozen=True)
class Asked:
    """One line of a questions file."""

    place: str
    """Where it stands, `file:line`, for error messages."""
    video: Path
    """Path of the video."""
    question: str
    """Text, without the options."""
    answer: str
    """The right answer; with options, one of them, word for word."""
    options: tuple[str, ...]
    """The choices; empty for a free answer."""


@dataclass(frozen=True)
class Questions(Task):
    """Videos with questions, in an order that `seed` shuffles."""

    name: str
    """The folder, as the user named it."""
    asked: tuple[Asked, ...]
    """The questions, in the order of the file."""
    seed: int
    """Of the shuffle."""
    digest: str
    """SHA-256 of the questions."""
    videos: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each video's content, by its name in the questions."""
    unpacked: object = None
    """Temporary folder of a data set's videos, which must live as long as the task."""

    @property
    def size(self) -> int:  # type: ignore[override]
        """How many questions there are."""
        return len(self.asked)

    def item(self, index: int) -> Item:
        order = np.random.default_rng(self.seed).permutation(len(self.asked))
        asked = self.asked[int(order[index])]
        text = prompt_with_options(asked.question, asked.options)
        expected = normal(asked.answer)
        if asked.options:
            expected = chr(ord("A") + asked.options.index(asked.answer))
        return Item(asked.place, asked.video, ((text, asked.answer),), expected, asked.options)

    def settings(self) -> dict[str, Any]:
        return {"task": self.name, "questions": len(self.asked), "sha256": self.digest, "videos": self.videos}


class _Row(BaseModel):
    """A line of a questions file, or a row of a data set."""

    model_config = ConfigDict(extra="ignore", strict=True)

    video: str = Field(pattern=r"\S")
    question: str = Field(pattern=r"\S")
    answer: str = Field(pattern=r"\S")
    options: list[Annotated[str, Field(min_length=1)]] | None = None


def open_folder(folder: Path, seed: int, questions: Path | None, allow_outside: bool = False) -> Task:
    """The task in `folder`. Raises MediaError or TokenReduceError, naming file and line.

    allow_outside: videos may lie outside of `folder`. Links of a hub's cache count as inside.
    """
    folder = expanded(folder, MediaError)
    if not (exists(folder) and folder.is_dir()):
        raise MediaError(
            f"{shown(folder)}: no such task; give `needle`, a folder of videos with {QUESTIONS}, or a data set saved to disk"
        )
    if questions is None and any((folder / name).is_file() for name in DATASET_FILES):
        return _dataset(folder, seed, allow_outside)
    file = expanded(questions or folder / QUESTIONS, MediaError)
    if not exists(file):
        raise MediaError(f"{shown(file)}: cannot be read (No such file); name the questions file with --questions")
    text = read_text(file, MediaError, QUESTION_BYTES)
    asked = []
    for number, line in enumerate(text.split("\n"), start=1):  # U+2028 and the like are no ends of lines in JSONL.
        if line.strip():
            place = f"{shown(file)}:{number}"
            asked.append(_asked(parse_json(line, place, MediaError), place, folder, allow_outside))
    return _questions(str(folder), asked, seed)


def _questions(name: str, asked: list[Asked], seed: int) -> Questions:
    if not asked:
        raise MediaError(f"{name}: no questions in it")
    files = {a.video: f"sha256 {content_hash(a.video)}" for a in asked}
    videos = {file.name if _alone(files, file) else str(file): digest for file, digest in files.items()}
    text = json.dumps([[files[a.video], a.question, a.answer, a.options] for a in asked])
    return Questions(name, tuple(asked), seed, hashlib.sha256(text.encode()).hexdigest(), videos)


def _alone(files: Mapping[Path, str], file: Path) -> bool:
    """Whether the name of `file` is that of no other."""
    return sum(other.name == file.name for other in files) == 1


def _asked(row: Any, place: str, folder: Path, allow_outside: bool) -> Asked:
    """One checked row."""
    if not isinstance(row, Mapping):
        raise MediaError(f"{place}: expected an object with {', '.join(REQUIRED)}, found {type(row).__name__}")
    given = validated(_Row, dict(row), place, MediaError)
    options, answer = given.options or [], given.answer
    if len(options) == 1 or len(options) > MOST_OPTIONS or len(set(options)) < len(options):
        raise MediaError(f"{place}: options: expected 2 to {MOST_OPTIONS} different texts, got {options!r:.60}")
    letter = answer.strip().upper()
    if options and answer not in options and len(letter) == 1 and 0 <= ord(letter) - ord("A") < len(options):
        answer = options[ord(letter) - ord("A")]
    if options and answer not in options:
        raise MediaError(f"{place}: answer: {answer!r:.60} is neither one of the options nor the letter of one")
    if not options and not normal(answer):
        raise MediaError(f"{place}: answer: no word to look for in {answer!r:.60}")
    return Asked(place, _video(folder, given.video, place, allow_outside), given.question, answer, tuple(options))


def _video(folder: Path, name: str, place: str, allow_outside: bool) -> Path:
    """The file that a row names. MediaError where there is none, or where it is outside of `folder` and may not be."""
    video = folder / name
    try:
        found = video.resolve(strict=True)
        regular = found.is_file()
    except (OSError, ValueError, RuntimeError):
        raise MediaError(f"{place}: video: no such file {shown(video)}") from None
    if not regular:
        raise MediaError(f"{place}: video: {shown(video)} is not a regular file")
    inside = Path(os.path.normpath(video)).is_relative_to(os.path.normpath(folder))
    if not allow_outside and not (
        inside and (found.is_relative_to(folder.resolve()) or _BLOB.search(found.as_posix()))
    ):
        raise MediaError(
            f"{place}: video: {shown(name)} leads out of {shown(folder)}, to {shown(found)}; "
            "give --allow-outside if you trust the questions file"
        )
    return video


def _dataset(folder: Path, seed: int, allow_outside: bool) -> Task:
    """A data set with the columns video, question, answer and, if it likes, options. Nothing is fetched or executed."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise TokenReduceError(
            f"{folder} is a data set on disk, and reading it needs an optional package: pip install datasets"
        ) from None
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # of several libraries
        raise MediaError(f"{folder}: the data set cannot be read ({one_line(error, 200)})") from error
    if isinstance(loaded, datasets.DatasetDict):
        splits = ", ".join(loaded)
        raise MediaError(f"{folder}: holds several splits; give the folder of one of them ({splits})")
    missing = [name for name in REQUIRED if name not in loaded.column_names]
    if missing:
        raise MediaError(
            f"{folder}: no column '{missing[0]}'; it needs {', '.join(REQUIRED)}, and has {', '.join(loaded.column_names)}"
        )
    if isinstance(loaded.features["video"], datasets.Video):
        loaded = loaded.cast_column("video", datasets.Video(decode=False))
    unpacked = tempfile.TemporaryDirectory(prefix="tokenreduce-")
    asked = []
    for number, row in enumerate(loaded):
        place = f"{folder}[{number}]"
        video = row["video"]
        own = False
        if isinstance(video, Mapping):
            own = bool(video.get("bytes"))
            row = {**row, "video": _file(video, Path(unpacked.name), number, place)}
        asked.append(_asked(row, place, folder, allow_outside or own))
    return replace(_questions(str(folder), asked, seed), unpacked=unpacked)


def _file(video: Mapping[str, Any], folder: Path, number: int, place: str) -> str:
    """Path of a video that a data set holds as bytes or by path."""
    if video.get("bytes"):
        suffix = Path(str(video.get("path") or "video.mp4")).suffix
        file = folder / f"{number:06d}{suffix}"
        file.write_bytes(video["bytes"])
        return str(file)
    if not video.get("path"):
        raise MediaError(f"{place}: field 'video': neither bytes nor a path")
    return str(video["path"])
