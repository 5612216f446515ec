"""The settings of a comparison: everything that decides its results, as plain data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenreduce import __version__
from tokenreduce.compare.arms import Arm
from tokenreduce.compare.files import open_folder
from tokenreduce.compare.identity import Say, code, combined, environment, model_files
from tokenreduce.compare.measure import Bench, Sampling
from tokenreduce.compare.needles import NEEDLE, needles
from tokenreduce.compare.tasks import Task
from tokenreduce.config.versions import FOLDER
from tokenreduce.errors import TokenReduceError
from tokenreduce.testbed.embedded import EMBEDDED, WEIGHTS

MOST_EXAMPLES = 1_000_000
"""A report reads all rows at once."""


@dataclass(frozen=True)
class Settings:
    """What to compare, and on what."""

    task: str
    """Name or path, see `open_task`."""
    arms: tuple[Arm, ...]
    """In the order of the tables."""
    examples: int
    """How many, the same for each arm."""
    seed: int
    """Of the examples, and of the bootstrap's draws."""
    baseline: str
    """Name of the arm that the others are tested against."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `open_task`."""
    sampling: Sampling = field(default_factory=Sampling)
    """Of frames from video files."""
    loading: dict[str, Any] = field(default_factory=dict)
    """Arguments of `load_model`: device, dtype, attention."""
    new_tokens: int | None = None
    """Tokens of an answer at most; None: the task's own number."""

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if not 1 <= self.examples <= MOST_EXAMPLES:
            raise TokenReduceError(f"examples must be 1 to {MOST_EXAMPLES:,}, got {self.examples}")
        if self.baseline not in names:
            raise TokenReduceError(f"baseline {self.baseline} is none of the arms: {', '.join(names)}")

    @property
    def models(self) -> list[str]:
        """Models, in the order of the arms."""
        return list(dict.fromkeys(arm.model for arm in self.arms))

    def open_task(self) -> Task:
        """The task. Raises TokenReduceError where it has fewer examples than asked for."""
        task = open_task(self.task, self.seed, **self.task_options)
        if task.size is not None and task.size < self.examples:
            raise TokenReduceError(f"{self.task} has {task.size} questions, {self.examples} examples were asked for")
        return task

    def bench(self, model: str, task: Task) -> Bench:
        """The bench of one model."""
        arms = [arm for arm in self.arms if arm.model == model]
        return Bench(model, arms, self.new_tokens or task.new_tokens, task.frame_times, self.sampling, self.loading)

    def to_dict(self, task: Task, say: Say = lambda line: None) -> dict[str, Any]:
        """Plain data; two comparisons whose data are equal may share a folder. say: told of long work."""
        files = {model: model_files(model, say) for model in self.models}
        return {
            "version": FOLDER,
            "tokenreduce": __version__,
            "code": code(arm.pipeline for arm in self.arms if arm.pipeline is not None),
            "environment": environment(self.loading.get("device")),
            "files": files,
            "task": task.settings(),
            "seed": self.seed,
            "examples": self.examples,
            "baseline": self.baseline,
            "new_tokens": self.new_tokens or task.new_tokens,
            "sampling": vars(self.sampling),
            "loading": {name: str(value) for name, value in self.loading.items()},
            "models": {model: combined(files[model]) if files[model] else "random weights" for model in self.models},
            "arms": [arm.settings() for arm in self.arms],
        }


def open_task(name: str, seed: int, **options: Any) -> Task:
    """`needle`, a folder of videos with a questions file, or a data set saved by the `datasets` library.

    options: of `needles`, plus `questions`: path of a questions file, and `allow_outside`, see `open_folder`.
    """
    questions, outside = options.pop("questions", None), options.pop("allow_outside", False)
    if name == NEEDLE:
        return needles(seed=seed, **options)
    return open_folder(Path(name), seed, None if questions is None else Path(questions), outside)


def fingerprint(model: str) -> str:
    """The hash of the weights of a model in a folder; the name of one on the hub."""
    folder = WEIGHTS if model == EMBEDDED else Path(model)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return "random weights" if model == EMBEDDED else model
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(1 << 22):
                digest.update(block)
    return f"sha256 {digest.hexdigest()}"


def baseline_name(arms: Sequence[Arm], asked: str | None) -> str:
    """The arm to test against: the one asked for, else the dense arm of the first model."""
    return asked or next(arm.name for arm in arms if arm.pipeline is None)
