"""One process of a comparison: it holds a model and runs units of work, one after the other."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tokenreduce.compare.checks import Check, check_model
from tokenreduce.compare.measure import Bench
from tokenreduce.compare.patches import picture
from tokenreduce.compare.settings import Settings
from tokenreduce.compare.store import Unit
from tokenreduce.compare.tasks import Task


@dataclass
class Done:
    """What came of one unit."""

    unit: Unit
    """Model and index of the example."""
    rows: list[dict[str, Any]]
    """One per arm of the model."""
    checks: list[Check] = field(default_factory=list)
    """Of the model; empty but for its first unit."""
    picture: dict[str, Any] | None = None
    """Strips of the example, see `patches.picture`; None where none are drawn."""


class Worker:
    """Runs units one after the other, in this process. Its first unit of each model brings the checks."""

    def __init__(self, settings: Settings, task: Task, pictures: int) -> None:
        self.settings, self.task, self.pictures = settings, task, pictures
        self._bench: Bench | None = None
        self._lost = Counter[str]()

    def run(self, unit: Unit) -> Done:
        """One example through all arms of one model."""
        model, index = unit
        item = self.task.item(index)
        checks: list[Check] = []
        if self._bench is None or self._bench.name != model:
            self._bench = None  # The last model goes before the next one comes.
            self._bench = self.settings.bench(model, self.task)
            checks = check_model(self._bench, item)
            self._bench.warm_up(item)
        rows, outcomes = self._bench.rows(item, index)
        right = {row["arm"]: bool(row["right"]) for row in rows}
        lost = [arm for arm, own in right.items() if not own and right.get(self.settings.baseline)]
        # The first examples, and of each arm the first that it loses.
        wanted = index < self.pictures or any(self._lost[arm] < self.pictures for arm in lost)
        self._lost.update(lost if wanted else ())
        drawn = picture(self._bench, item, index, outcomes) if wanted else None
        return Done(unit, rows, checks, drawn)
