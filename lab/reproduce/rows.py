"""Finished rows on disk, one JSON object per line; what is there is not run again."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from lab.reproduce.measure import Unit
from lab.reproduce.plan import Condition, digest
from tokenreduce.errors import TokenReduceError

BLOCK, ROUND = 10, 50
"""Examples of one unit at most, and of one condition before the next one has its turn."""
Row = dict[str, Any]
Key = tuple[str, str, str, int]


class Rows:
    """The rows of one folder, open for more. A line that a kill cut short is dropped."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "rows.jsonl"
        self._file = self.path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise TokenReduceError(
                f"{self.path} is in use by another run; wait for it or give another --cache"
            ) from None
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        try:
            self.rows: list[Row] = [json.loads(line) for line in whole.splitlines()]
            self._keys = {key(row) for row in self.rows}
        except (ValueError, KeyError, TypeError):
            self._file.close()
            raise TokenReduceError(
                f"{self.path}: not rows of a reproduction; remove it or give another --cache"
            ) from None

    def __enter__(self) -> Rows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, rows: Iterable[Row]) -> None:
        """Add the rows of one unit; they are on disk on return."""
        new = list(rows)
        self._file.write("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in new).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows += new
        self._keys.update(map(key, new))

    def missing(self, needs: dict[Condition, dict[str, int]]) -> list[Unit]:
        """What is still to run: the first ROUND examples of every condition, then the next, so that a run cut short is even."""
        units = []
        for condition, arms in needs.items():
            for start in range(0, max(arms.values()), BLOCK):
                todo: dict[tuple[str, ...], list[int]] = {}
                for index in range(start, start + BLOCK):
                    names = tuple(arm for arm, n in arms.items() if index < n and not self._has(condition, arm, index))
                    todo.setdefault(names, []).append(index)
                units += [Unit(condition, tuple(indices), names) for names, indices in todo.items() if names]
        return sorted(units, key=lambda unit: unit.indices[0] // ROUND)

    def _has(self, condition: Condition, arm: str, index: int) -> bool:
        return (condition.key, arm, digest(arm, condition.frames), index) in self._keys

    def of(self, condition: Condition, arm: str, examples: int) -> dict[int, Row]:
        """Rows by index, of the first `examples` examples and of the arm's pipeline as it is now."""
        mark = digest(arm, condition.frames)
        return {
            row["index"]: row
            for row in self.rows
            if row["arm"] == arm
            and row["condition"] == condition.key
            and row["pipeline"] == mark
            and row["index"] < examples
        }


def key(row: Row) -> Key:
    """What a row is of."""
    return row["condition"], row["arm"], row["pipeline"], row["index"]
