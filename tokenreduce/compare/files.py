"""Tasks from files: videos with a questions file (JSONL), or a data set that the `datasets` library saved to disk."""

from __future__ import annotations

import hashlib
import importlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tokenreduce.compare.tasks import Item, Task, normal, prompt_with_options
from tokenreduce.errors import MediaError, TokenReduceError

QUESTIONS = "questions.jsonl"
DATASET_FILES = ("dataset_info.json", "dataset_dict.json")
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
    """SHA-256 of the questions and of the videos' names and sizes."""
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
        return {"task": self.name, "questions": len(self.asked), "sha256": self.digest}


def open_folder(folder: Path, seed: int, questions: Path | None) -> Task:
    """The task in `folder`. Raises MediaError or TokenReduceError, naming file and line."""
    if not folder.is_dir():
        raise MediaError(
            f"{folder}: no such task; give `needle`, a folder of videos with {QUESTIONS}, or a data set saved to disk"
        )
    if questions is None and any((folder / name).is_file() for name in DATASET_FILES):
        return _dataset(folder, seed)
    file = questions or folder / QUESTIONS
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise MediaError(
            f"{file}: cannot be read ({error.strerror}); name the questions file with --questions"
        ) from None
    except UnicodeDecodeError as error:
        raise MediaError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    asked = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{file}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise MediaError(f"{place}: not valid JSON ({error})") from None
        asked.append(_asked(row, place, folder))
    return _questions(str(folder), asked, seed)


def _questions(name: str, asked: list[Asked], seed: int) -> Questions:
    if not asked:
        raise MediaError(f"{name}: no questions in it")
    text = json.dumps([[a.video.name, a.video.stat().st_size, a.question, a.answer, a.options] for a in asked])
    return Questions(name, tuple(asked), seed, hashlib.sha256(text.encode()).hexdigest())


def _asked(row: Any, place: str, folder: Path) -> Asked:
    """One checked row."""
    if not isinstance(row, Mapping):
        raise MediaError(f"{place}: expected an object with {', '.join(REQUIRED)}, found {type(row).__name__}")
    for name in REQUIRED:
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise MediaError(f"{place}: field '{name}': expected text, got {row.get(name)!r:.60}")
    options = row.get("options")
    options = [] if options is None else options
    if not isinstance(options, list) or not all(isinstance(option, str) and option for option in options):
        raise MediaError(f"{place}: field 'options': expected a list of texts, got {options!r:.60}")
    if len(options) == 1 or len(options) > MOST_OPTIONS or len(set(options)) < len(options):
        raise MediaError(f"{place}: field 'options': expected 2 to {MOST_OPTIONS} different texts, got {options!r:.60}")
    answer = row["answer"]
    letter = answer.strip().upper()
    if options and answer not in options and len(letter) == 1 and 0 <= ord(letter) - ord("A") < len(options):
        answer = options[ord(letter) - ord("A")]
    if options and answer not in options:
        raise MediaError(f"{place}: field 'answer': {answer!r:.60} is neither one of the options nor the letter of one")
    if not options and not normal(answer):
        raise MediaError(f"{place}: field 'answer': no word to look for in {answer!r:.60}")
    video = folder / row["video"]
    if not video.is_file():
        raise MediaError(f"{place}: field 'video': no such file {video}")
    return Asked(place, video, row["question"], answer, tuple(options))


def _dataset(folder: Path, seed: int) -> Task:
    """A data set with the columns video, question, answer and, if it likes, options. Nothing is fetched or executed."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise TokenReduceError(
            f"{folder} is a data set on disk, and reading it needs an optional package: pip install 'tokenreduce[datasets]'"
        ) from None
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise MediaError(f"{folder}: the data set cannot be read ({' '.join(str(error).split())[:200]})") from None
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
        if isinstance(video, Mapping):
            row = {**row, "video": _file(video, Path(unpacked.name), number, place)}
        asked.append(_asked(row, place, folder))
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
